"""What the README tells people to type exists: commands, their options, make targets; and one version everywhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from serve_app.command import app
from viewmesh import __version__

ROOT = Path(__file__).resolve().parent.parent
COMMAND = typer.main.get_command(app)
TARGETS = set(re.findall(r"^([a-zA-Z][\w-]*)\s*:(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
ENDS = {"|", "||", "&&", ";", "&"}


def blocks(markdown: str) -> list[str]:
    """The insides of the fenced blocks marked bash, sh, shell or console."""
    return re.findall(r"^```(?:bash|sh|shell|console)[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def lines(block: str) -> list[list[str]]:
    """Each command of a block as words, without prompts, comments, redirections and what comes after a pipe."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        while words:
            end = next((n for n, word in enumerate(words) if word in ENDS), len(words))
            command, words = words[:end], words[end + 1 :]
            redirect = next((n for n, word in enumerate(command) if set(word) <= set("<>&")), len(command))
            command = command[:redirect]
            while command and re.fullmatch(r"\w+=.*", command[0]):  # environment for one command
                command = command[1:]
            if command:
                found.append(command)
    return found


def subcommands(command: Any) -> dict[str, Any]:
    """Empty for a command that is not a group. Looked at by attribute: typer may bring a click of its own."""
    return getattr(command, "commands", {})


def fault(words: list[str]) -> str | None:
    """What is wrong with a `viewmesh` or `make` command; None if nothing is, or if it is another program."""
    program = Path(words[0]).name
    if program == "make":
        named = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        missing = [w for w in named if w not in TARGETS]
        return f"there is no make target {missing[0]}" if missing else None
    if program != "viewmesh":
        return None
    command, rest = COMMAND, words[1:]
    while (inner := subcommands(command)) and rest and not rest[0].startswith("-"):
        if rest[0] not in inner:
            return f"there is no command {rest[0]}"
        command, rest = inner[rest[0]], rest[1:]
    known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    unknown = [w for w in rest if re.match(r"--?[a-zA-Z]", w) and w.split("=")[0] not in known]
    return f"{command.name} has no option {unknown[0]}" if unknown else None


def documents() -> list[Path]:
    return [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]


def commands(file: Path) -> list[list[str]]:
    return [words for block in blocks(file.read_text()) for words in lines(block)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("make demo", None) if "demo" in TARGETS else ("make test", None),
     ("$ make tset  # the tests", "there is no make target tset"),
     ("viewmesh reconstruct photos/ -o out --preset preview && ls out", None),
     ("FOO=1 .venv/bin/viewmesh reconstruct a.zip -o out \\\n   --no-such x", "reconstruct has no option --no-such"),
     ("cd x && viewmesh recontsruct y", "there is no command recontsruct"),
     ("viewmesh weights download trellis", None), ("viewmesh weights fetch trellis", "there is no command fetch"),
     ("curl -X POST localhost:8000 > out.json", None), ("viewmesh doctor --json | jq .", None)],
)  # fmt: skip
def test_the_reader_of_commands_finds_faults(line: str, expected: str | None):
    found = [fault(words) for words in lines(blocks(f"text\n```bash\n{line}\n```\n")[0])]
    assert [f for f in found if f] == ([expected] if expected else [])


def test_what_the_documents_say_to_type_exists():
    faults = {
        f"{file.name}: {shlex.join(words)}": wrong
        for file in documents()
        for words in commands(file)
        if (wrong := fault(words))
    }
    assert faults == {}


def test_the_readme_begins_with_what_to_type():
    """The first screen gives make demo and make test."""
    readme = ROOT / "README.md"
    typed = [words[:2] for words in commands(readme)]
    assert ["make", "demo"] in typed
    assert ["make", "test"] in typed
    assert any(Path(words[0]).name == "viewmesh" for words in commands(readme))
    first_screen = "\n".join(readme.read_text().splitlines()[:60])
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_links_inside_the_repository_lead_somewhere():
    for file in documents():
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"#]+)\"", text)
        dead = [
            link for link in links if "://" not in link and "mailto:" not in link and not (file.parent / link).exists()
        ]
        assert dead == [], file.name


def test_make_targets_explain_themselves():
    text = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z][\w-]*):.*##", text, re.MULTILINE))
    assert {"setup", "lint", "test"} <= explained <= TARGETS
    assert {t for t in TARGETS if not t.startswith(".")} == explained


def test_every_command_and_option_has_help():
    def walk(command: Any, path: str) -> list[str]:
        silent = [] if command.help or path == "viewmesh" else [path]
        silent += [f"{path} {p.name}" for p in command.params if not getattr(p, "help", "") and p.name != "help"]
        return silent + [s for name, c in subcommands(command).items() for s in walk(c, f"{path} {name}")]

    assert walk(COMMAND, "viewmesh") == []


def test_one_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.*)"', project, re.MULTILINE) == [__version__]
    headings = re.findall(r"^## \[?v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == __version__


def test_the_files_that_are_yaml_parse():
    for name in ("serve_config.yaml",):
        assert yaml.safe_load((ROOT / name).read_text())
