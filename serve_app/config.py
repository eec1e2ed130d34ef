"""serve_config.yaml: checking it more strictly than Ray does, and fitting it to the machine at hand.

Ray accepts unknown keys in silence; a typo then means a default nobody asked for. Here every key is looked up.
"""

import copy
import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.models import MODELS
from serve_app.settings import AppArgs, ConductorConfig, RouterConfig
from viewmesh.errors import OptionError
from viewmesh.weights.ready import readiness

GENERATIVE = tuple(model.name for model in MODELS.values() if model.kind == "generator")
DEPLOYMENTS = ("Router", "Conductor", "Preprocessor", "Nvdiffrec", "Exporter")
OWN_CONFIG = {"Router": RouterConfig, "Conductor": ConductorConfig}
WORKER_CONFIG = {
    "Preprocessor": {"stall_s"},
    "Exporter": {"stall_s"},
    "Nvdiffrec": {"stall_s", "slice_s", "warm_jobs"},
    "Trellis": {"stall_s", "compile", "together", "models"},
}


def load(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(file.read_text())
    except OSError as error:
        raise OptionError(f"{file}: cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise OptionError(f"{file}: is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise OptionError(f"{file}: must be a mapping.")
    return value


def check(config: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a Serve config, one sentence each; empty if nothing is."""
    from ray.serve.schema import ServeDeploySchema

    found = unknown_keys(config, ServeDeploySchema, "")
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        found += [f"{_where(item['loc'])}: {item['msg']}" for item in error.errors()]
    except ValueError as error:
        found.append(str(error))
    for i, application in enumerate(config.get("applications") or []):
        if isinstance(application, dict):
            found += _check_application(application, f"applications.{i}")
    return list(dict.fromkeys(found))


def _check_application(application: dict[str, Any], at: str) -> list[str]:
    from ray.serve.config import AutoscalingConfig

    found: list[str] = []
    if application.get("import_path") == "serve_app.app:build":
        found += _errors_of(AppArgs, application.get("args") or {}, f"{at}.args")
    for j, deployment in enumerate(application.get("deployments") or []):
        if not isinstance(deployment, dict):
            continue
        here, name = f"{at}.deployments.{j}", deployment.get("name")
        known = (*DEPLOYMENTS, "Trellis")
        if application.get("import_path") == "serve_app.app:build" and name not in known:
            found.append(f"{here}.name: there is no deployment {name!r}{_meant(str(name), known)}")
        scaling = deployment.get("autoscaling_config")
        if isinstance(scaling, dict):
            found += _errors_of(AutoscalingConfig, scaling, f"{here}.autoscaling_config")
        given = deployment.get("user_config") or {}
        if name in OWN_CONFIG:
            found += _errors_of(OWN_CONFIG[name], given, f"{here}.user_config")
        elif name in WORKER_CONFIG:
            keys = WORKER_CONFIG[name]
            found += [f"{here}.user_config.{k}: unknown{_meant(k, keys)}" for k in given if k not in keys]
        if name == "Trellis":
            found += _check_held(given.get("models"), application, f"{here}.user_config.models")
    return found


def _check_held(held: Any, application: dict[str, Any], at: str) -> list[str]:
    """What is wrong with the models that Trellis shall hold."""
    if held is None:
        return []
    if not isinstance(held, list) or not held:
        return [f"{at}: must be a list of one or more of {', '.join(GENERATIVE)}"]
    found = [f"{at}: there is no model {m!r}{_meant(str(m), GENERATIVE)}" for m in held if m not in GENERATIVE]
    named = (application.get("args") or {}).get("models")
    lacking = [m for m in held if named is not None and m in GENERATIVE and m not in named]
    return found + [f"{at}: {m} is not in args.models, so that nobody would ask for it" for m in lacking]


def unknown_keys(value: Any, model: type[BaseModel], at: str) -> list[str]:
    """The keys of a value, at any depth, that its pydantic model does not have."""
    if not isinstance(value, dict):
        return []
    found: list[str] = []
    fields = dict(model.model_fields)
    for key, item in value.items():
        here = f"{at}.{key}" if at else str(key)
        if key not in fields:
            found.append(f"{here}: unknown key{_meant(str(key), fields)}")
            continue
        for inner in _models_in(fields[key].annotation):
            if isinstance(item, list):
                for i, entry in enumerate(item):
                    found += unknown_keys(entry, inner, f"{here}.{i}")
            else:
                found += unknown_keys(item, inner, here)
            break
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _errors_of(model: type[BaseModel], value: Any, at: str) -> list[str]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        return [f"{_where((at, *item['loc']))}: {item['msg']}" for item in error.errors()]
    return []


def _where(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location)


def _meant(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def adapted(
    config: dict[str, Any],
    *,
    cpus: int,
    gpus: int,
    data: Path | None = None,
    port: int | None = None,
    host: str | None = None,
) -> dict[str, Any]:
    """The config for a machine: without GPUs Nvdiffrec runs on the CPU, and nothing asks for more than there is.

    data, port, host: instead of the config's own. A database or artifact store that the config names stays.
    """
    fitted = copy.deepcopy(config)
    http = fitted.setdefault("http_options", {})
    if port is not None:
        http["port"] = port
    if host is not None:
        http["host"] = host
    for application in fitted.get("applications", []):
        args = application.setdefault("args", {})
        if data is not None:
            args["data"] = str(data.absolute())
        generative = _generative_models(args, gpus)
        _share_gpus(application, generative, gpus)
        for deployment in application.get("deployments", []):
            name = deployment.get("name")
            options = deployment.setdefault("ray_actor_options", {})
            scaling = deployment.get("autoscaling_config")
            if name == "Nvdiffrec":
                if gpus == 0:
                    options.update(num_gpus=0, num_cpus=min(1, cpus))
                replicas = max(1, gpus - bool(generative))
                if scaling:
                    _limit_replicas(scaling, scaling.get("max_replicas", replicas), replicas)
                    _limit_slots(application, scaling["max_replicas"])
            elif name in ("Preprocessor", "Exporter"):
                if cpus <= 4:  # on a small machine they share what the optimiser leaves
                    options["num_cpus"] = 0.3
                if scaling:
                    _limit_replicas(scaling, scaling.get("max_replicas", 1), max(1, cpus // 2))
    return fitted


def data_folder(config: dict[str, Any]) -> Path:
    """Where the config's application keeps its data; relative to the current folder, as for `serve run`."""
    for application in config.get("applications", []):
        given = (application.get("args") or {}).get("data")
        if given is not None:
            return Path(given)
    return AppArgs.model_validate({}).data


def _generative_models(args: dict[str, Any], gpus: int) -> list[str]:
    """Those that will be served. On a machine without a GPU they are only when named: there they take hours."""
    if args.get("fake"):
        return []
    if args.get("models") is None:
        found = [name for name in GENERATIVE if readiness(name, args.get("weights") or {}).ready]
        if gpus or not found:
            return found
        args["models"] = ["nvdiffrec"]
    return [name for name in GENERATIVE if name in args["models"]]


def _limit_replicas(scaling: dict[str, Any], wanted: int, most: int) -> None:
    """Ray refuses a least, or a first, number of replicas above the largest."""
    scaling["max_replicas"] = min(wanted, most)
    for name in ("min_replicas", "initial_replicas"):
        if scaling.get(name) is not None:
            scaling[name] = min(scaling[name], scaling["max_replicas"])


def _limit_slots(application: dict[str, Any], most: int) -> None:
    """More jobs than Nvdiffrec has replicas would take turns on them, each turn loading a checkpoint."""
    listed: list[dict[str, Any]] = application["deployments"]
    if not any(d.get("name") == "Conductor" for d in listed):
        listed.append({"name": "Conductor"})
    conductor = next(d for d in listed if d.get("name") == "Conductor")
    slots = conductor.setdefault("user_config", {}).setdefault("slots", {})
    slots["nvdiffrec"] = min(slots.get("nvdiffrec", most), most)


def _share_gpus(application: dict[str, Any], generative: list[str], gpus: int) -> None:
    """Gives the generative models' worker an entry. Where there is one GPU, it and Nvdiffrec share it."""
    listed = application.setdefault("deployments", [])
    if generative and not any(d.get("name") == "Trellis" for d in listed):
        listed.append({"name": "Trellis", "ray_actor_options": {"num_gpus": 1}})
    if not generative or gpus > 1:
        return
    for deployment in listed:
        if deployment.get("name") in ("Nvdiffrec", "Trellis"):
            deployment.setdefault("ray_actor_options", {})["num_gpus"] = 0.5 if gpus else 0
            if deployment["name"] == "Trellis" and gpus == 0:
                deployment["ray_actor_options"]["num_cpus"] = 0.3


def import_target(config: dict[str, Any]) -> None:
    """Raises OptionError if the import path of an application does not import."""
    for application in config.get("applications", []):
        path = str(application.get("import_path", ""))
        module, _, name = path.replace(":", ".").rpartition(".")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise OptionError(f"import_path {path!r} cannot be imported: {error}") from error
