"""Counts what is launched on the device: where a batch is small, this is what a step costs on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """All of torch's operations but views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "_unsafe_view" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
