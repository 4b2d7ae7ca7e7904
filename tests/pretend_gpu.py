"""A GPU that is pretended, for machines without one.

    with pretended() as launched: ...       inside, the machine has a GPU; launched: its operators

A tensor on it is a wrapper around a CPU tensor that says `cuda` and refuses what a GPU's refuses.
What it shows: that code moves its tensors to the GPU and back, makes new ones where the others are,
draws random numbers from a generator there, and how many operators a step starts there. What it
can't show: speed, CUDA's own kernels, rounding and streams. `pytest -m gpu` is for a real one.

Two modes stand between Python and PyTorch: Calls replaces `cuda` in what is called by a device type
that no machine has, since PyTorch would look for a GPU; Operators runs each operator on what is
wrapped.
"""

import contextlib
import re
import threading
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

HERE, TO_GPU, TO_CPU = torch.device("cuda:0"), torch.device("ipu:0"), torch.device("fpga:0")
aten = torch.ops.aten
TAKE_ANY = {aten.copy_, aten._to_copy, aten.fill_, aten.set_}              # from another device
TAKE_CPU_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_,
                    aten._unsafe_index, aten._unsafe_index_put}
TAKE_CPU_SCALARS = {aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_,
                    aten.fill, aten._fused_adam_, aten._foreach_mul_}
VIEWS = {"view", "_unsafe_view", "expand", "permute", "t", "transpose", "slice", "select", "detach",
         "alias", "unsqueeze", "squeeze", "split", "unbind", "diagonal", "as_strided", "unfold"}


class Call(threading.local):
    on_gpu = False           # whether the function called from Python got tensors on the GPU


CALL = Call()


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `inside` has its numbers."""

    @staticmethod
    def __new__(cls, inside):
        new = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, dtype=inside.dtype, strides=inside.stride(),
            storage_offset=inside.storage_offset())
        new.inside = inside
        return new

    device = property(lambda self: HERE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.inside.tolist()

    def record_stream(self, stream):
        pass

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


def run(func, args, kwargs):
    """An operator on the CPU tensors inside; its result is on the GPU if its tensors are, or if it
    was told so."""
    device = kwargs.get("device")
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in given if isinstance(t, OnGPU)]
    here = [t for t in given if not isinstance(t, OnGPU)]
    follows = device in (None, torch.device("cpu")) and (there or not here and CALL.on_gpu)
    if there and here:
        refuse_mixed(func, args, here)
    if device in (HERE, TO_GPU, TO_CPU):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    got = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if not (follows or device in (HERE, TO_GPU)):
        return got
    written = {id(t.inside): t for t in there}

    def wrap(v):
        return written.get(id(v), OnGPU(v)) if isinstance(v, torch.Tensor) else v

    return tree_map(wrap, got)


def unwrap(v):
    return v.inside if isinstance(v, OnGPU) else v


def refuse_mixed(func, args, here):
    """Raise what PyTorch raises for tensors of two devices."""
    packet = func.overloadpacket
    if packet in TAKE_ANY:
        return
    changed = args[0] if func._schema.is_mutable else None
    indices, scalars = set(), torch.Tag.pointwise in func.tags or packet in TAKE_CPU_SCALARS
    if packet in TAKE_CPU_INDICES and isinstance(args[0], OnGPU):
        indices, scalars = {id(i) for i in tree_iter(args[1])}, True
    for t in here:
        if t is changed or id(t) not in indices and not (scalars and t.ndim == 0):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least "
                               f"two devices, cuda:0 and cpu! ({func})")


class Operators(TorchDispatchMode):
    """Runs each operator, and counts those that would start a kernel."""

    def __init__(self, launched):
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        gpu = any(isinstance(t, OnGPU) for t in tree_iter((args, kwargs)))
        if gpu and func.overloadpacket.__name__ not in VIEWS:
            self.launched.append(str(func))
        return run(func, args, kwargs)


class Calls(TorchFunctionMode):
    """`cuda` and `cpu` in the arguments of PyTorch's functions become stand-ins."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__):
            if isinstance(args[0], OnGPU):
                return HERE if func == torch.Tensor.device.__get__ else True
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            place = HERE if func is torch.Tensor.cuda else torch.device("cpu")
            func, args = torch.Tensor.to, (args[0], place)
        if func is torch.Tensor.new_tensor:
            about = {"device": args[0].device, "dtype": args[0].dtype}
            func, args, kwargs = torch.tensor, args[1:], about | kwargs
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            return self.__torch_function__(torch.Tensor.to, types, (made, device))
        if func == torch.Tensor.data.__set__ and isinstance(args[0], OnGPU):
            args[0].inside = args[1].inside
        check_generator(args, kwargs)
        if func is torch.Tensor.to and isinstance(args[0], OnGPU):
            args, kwargs = stay(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            if isinstance(args[0], OnGPU):           # PyTorch moves indices to the GPU itself
                args = args[0], tree_map(as_index, args[1]), *args[2:]
        outer = CALL.on_gpu
        CALL.on_gpu = any(isinstance(v, OnGPU) for v in tree_iter((args, kwargs)))
        try:
            return func(*tree_map(stand_in, args), **tree_map(stand_in, kwargs))
        finally:
            CALL.on_gpu = outer


def check_generator(args, kwargs):
    """A generator must be where the numbers are drawn."""
    drawn = kwargs.get("generator")
    if drawn is not None:
        device = next((t.device for t in args if isinstance(t, torch.Tensor)), "cpu")
        wanted = torch.device(kwargs.get("device") or device)
        if drawn.device.type != wanted.type:
            raise RuntimeError(f"Expected a '{wanted.type}' device type for generator but found "
                               f"'{drawn.device.type}'")


def stay(tensor, *args, **kwargs):
    """The arguments of tensor.to() for a tensor on the GPU: that it is to be there says nothing."""
    args = [v for v in args if not is_device(v, "cuda")]
    kwargs = {k: v for k, v in kwargs.items() if not is_device(v, "cuda")}
    return (tensor, *args), kwargs if args or kwargs else {"dtype": tensor.dtype}


def as_index(v):
    return OnGPU(v) if isinstance(v, torch.Tensor) and not isinstance(v, OnGPU) else v


def stand_in(v):
    return TO_GPU if is_device(v, "cuda") else TO_CPU if is_device(v, "cpu") else v


def is_device(v, kind):
    if isinstance(v, torch.device):
        return v.type == kind
    return isinstance(v, str) and re.fullmatch(rf"{kind}(:0)?", v) is not None


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        new = super().__new__(cls, device="cpu")
        new.where = torch.device(device)
        return new

    device = property(lambda self: self.where)


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class Stream:
    def __init__(self, device=None):
        pass

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass

    def is_capturing(self):                      # Adam asks, of a CUDA graph
        return False


@contextlib.contextmanager
def pretended():
    """Inside, in this thread and those that start there, the machine has a GPU. Gives the list of
    the operators that ran on it."""
    cuda = {"is_available": lambda: True, "is_current_stream_capturing": lambda: False,
            "device_count": lambda: 1, "current_device": lambda: 0,
            "_lazy_init": lambda: None, "manual_seed_all": lambda seed: None,
            "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
            "synchronize": lambda *_: None, "Stream": Stream, "default_stream": Stream,
            "current_stream": Stream, "stream": contextlib.nullcontext}
    launched, run_thread = [], threading.Thread.run

    def run_inside(thread):
        with Calls(), Operators(launched):
            run_thread(thread)

    patches = ((torch.cuda, cuda), (torch, {"Generator": Generator, "autocast": Autocast}),
               (torch.accelerator, {"current_stream": Stream}),
               (threading.Thread, {"run": run_inside}))
    with contextlib.ExitStack() as stack:
        for owner, names in patches:
            stack.enter_context(mock.patch.multiple(owner, **names))
        # a CPU's parameter can't become a wrapper
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Calls())
        stack.enter_context(Operators(launched))
        yield launched
