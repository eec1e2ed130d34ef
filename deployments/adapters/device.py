"""The memory of a torch device, as the engines report it and give it back; nothing of either on a CPU."""

import torch


class OnDevice:
    """The half of an engine that is the same for all that compute on a torch device."""

    device: torch.device

    def release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        return {"used": torch.cuda.memory_allocated(self.device), "free": free, "total": total}
