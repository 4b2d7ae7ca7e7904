"""A GPU that is pretended, for machines without one: the tensors on it are the CPU's, but say `cuda` and refuse what a GPU's refuse.

    python tests/pretend_gpu.py 02_train.py --device cuda --variant topk ...        a script as it would run on a GPU

What it shows: that code moves its tensors to the GPU and back, makes new ones where the others are, and draws random numbers from a generator
there; what CUDA would do on another device it does on the CPU, with the same autograd, and autocast's bfloat16. torch.cuda.memory_allocated()
and max_memory_allocated() count the tensors' bytes, without what an operator or the allocator takes for itself. What it can't show: speed,
CUDA's own kernels and their rounding, streams, whatever is wrong without an error on a CPU. `pytest -m gpu` is for a real one.

A tensor on the pretended GPU is a wrapper around a CPU tensor. Two modes stand between Python and PyTorch: Calls replaces `cuda` in what is
called by a device type that no machine has and PyTorch does not look for, Operators runs each operator on what is wrapped.
"""
import contextlib
import functools
import re
import runpy
import sys
import threading
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

HERE, TO_GPU, TO_CPU = torch.device("cuda:0"), torch.device("ipu:0"), torch.device("fpga:0")
aten = torch.ops.aten
TAKE_ANY = {aten.copy_, aten._to_copy, aten.fill_, aten.set_}                                          # between devices
TAKE_CPU_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index, aten._unsafe_index_put}
TAKE_CPU_SCALARS = {aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_, aten.fill, aten._fused_adam_, aten._foreach_mul_}


class Call(threading.local):
    on_gpu = False          # whether the function that is called from Python got tensors on the GPU, so that those it makes inside are there


CALL = Call()


class EqualsTensor(type(torch.Tensor)):
    """Of a class that is torch.Tensor for those who ask `type(x) == torch.Tensor`, as TransformerLens does."""

    def __eq__(cls, other):
        return other is cls or other is torch.Tensor

    __hash__ = type.__hash__


class Memory:
    """Bytes of the storages of all tensors on the GPU, now and at most."""

    def __init__(self):
        self.users, self.now, self.most = {}, 0, 0

    def hold(self, tensor):
        storage = tensor.inside.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        self.users[at] = self.users.get(at, 0) + 1
        self.now += size if self.users[at] == 1 else 0
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self.drop, at, size)

    def drop(self, at, size):
        self.users[at] -= 1
        self.now -= 0 if self.users[at] else size

    def start_again(self):
        self.most = self.now


MEMORY = Memory()


class OnGPU(torch.Tensor, metaclass=EqualsTensor):
    """A tensor on the pretended GPU; `inside` has its numbers."""

    @staticmethod
    def __new__(cls, inside):
        sparse = {} if inside.layout == torch.strided else {"dispatch_layout": True}
        strided = {"strides": inside.stride(), "storage_offset": inside.storage_offset()} if not sparse else {}
        with torch.inference_mode(False):        # a view of a tensor made before can't be one of inference mode
            new = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, layout=inside.layout, **strided, **sparse)
        new.inside = inside
        if not sparse and inside.device.type == "cpu":
            MEMORY.hold(new)
        return new

    device, is_cuda, is_cpu = property(lambda self: HERE), property(lambda self: True), property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"{self.inside!r} on {HERE}"

    def __deepcopy__(self, memo):
        new = OnGPU(self.inside.clone()).requires_grad_(self.requires_grad)
        vars(new).update({k: v for k, v in vars(self).items() if k != "inside"})
        return memo.setdefault(id(self), new)

    def __reduce_ex__(self, protocol):
        return restored, (self.inside.detach(), self.requires_grad, isinstance(self, torch.nn.Parameter))

    def as_subclass(self, cls):
        new = self.inside.as_subclass(cls)
        new.pretends = True                      # that it is on the GPU, when asked
        return new

    def tolist(self):
        return self.inside.tolist()

    def record_stream(self, stream):
        pass

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    __array__ = numpy

    def untyped_storage(self):                   # Triton's interpreter asks
        return self.inside.untyped_storage()

    def data_ptr(self):
        return self.inside.data_ptr()


def restored(inside, requires_grad, is_parameter):
    """What a tensor on the GPU is once it was pickled."""
    return torch.nn.Parameter(OnGPU(inside), requires_grad) if is_parameter else OnGPU(inside).requires_grad_(requires_grad)


def load(*args, map_location=None, **kwargs):
    """torch.load(), which gives what was saved on the pretended GPU back there without being told."""
    if map_location is None or torch.device(map_location).type != "cuda":
        return LOAD(*args, map_location=map_location, **kwargs)
    found = LOAD(*args, map_location="cpu", **kwargs)
    return found.to(HERE) if isinstance(found, torch.nn.Module) else tree_map(lambda v: v.to(HERE) if isinstance(v, torch.Tensor) else v, found)


LOAD = torch.load
torch.serialization.add_safe_globals([restored])


def run(func, args, kwargs):
    """An operator on the CPU tensors inside; what it gives is on the GPU if it was told so, or else if what it got is."""
    packet, device = func.overloadpacket, kwargs.get("device")
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    there, here = [t for t in given if isinstance(t, OnGPU)], [t for t in given if not isinstance(t, OnGPU)]
    on_gpu = device in (HERE, TO_GPU) or device in (None, torch.device("cpu")) and bool(there or not here and CALL.on_gpu)
    if there and here and packet not in TAKE_ANY:
        changed = args[0] if func._schema.is_mutable else None
        indices = {id(i) for i in tree_iter(args[1])} if packet in TAKE_CPU_INDICES and isinstance(args[0], OnGPU) else ()
        scalars = torch.Tag.pointwise in func.tags or packet in TAKE_CPU_INDICES | TAKE_CPU_SCALARS
        for t in here:
            if t is changed or id(t) not in indices and not (scalars and t.ndim == 0):
                raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})")
    if device in (HERE, TO_GPU, TO_CPU):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    inside = lambda v: v.inside if isinstance(v, OnGPU) else v
    got = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    written = {id(t.inside): t for t in there}
    outside = lambda v: written[id(v)] if id(v) in written else OnGPU(v) if on_gpu and isinstance(v, torch.Tensor) else v
    return tree_map(outside, got)


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_composite(func):                   # in inference mode nobody took it apart before
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return run(func, args, kwargs or {})


@functools.cache
def is_composite(func):
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


class Calls(TorchFunctionMode):
    """`cuda` and `cpu` in the arguments of PyTorch's functions, as strings or devices, become stand-ins: PyTorch would look for a GPU, and would
    not move a tensor to the CPU, where it believes it to be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__ and is_there(args[0]):
            return HERE
        if func == torch.Tensor.is_cuda.__get__ and is_there(args[0]):
            return True
        for v in args:
            if hasattr(v, "pretends") and torch._C._is_torch_function_enabled():
                with self:
                    return type(v).__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            func, args = torch.Tensor.to, (args[0], HERE if func is torch.Tensor.cuda else torch.device("cpu"))
        if func is torch.Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return self.__torch_function__(torch.Tensor.to, types, (func(*args, **kwargs), device))
        if func == torch.Tensor.data.__set__ and isinstance(args[0], OnGPU):
            args[0].inside = args[1].inside
        drawn = kwargs.get("generator")
        if drawn is not None:
            wanted = torch.device(kwargs.get("device") or next((t.device for t in args if isinstance(t, torch.Tensor)), "cpu"))
            if drawn.device.type != wanted.type != "meta":
                raise RuntimeError(f"Expected a '{wanted.type}' device type for generator but found '{drawn.device.type}'")
        if func is torch.Tensor.to:
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                args = (args[0], args[1].device, args[1].dtype, *args[2:])
            if is_there(args[0]):
                args, kwargs = stay(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_there(args[0]):      # where PyTorch moves indices itself
            there = lambda v: OnGPU(torch.as_tensor(v)) if isinstance(v, (list, torch.Tensor)) and not is_there(v) else v
            args = args[0], tuple(map(there, args[1])) if type(args[1]) is tuple else there(args[1]), *args[2:]
        outer, CALL.on_gpu = CALL.on_gpu, any(map(is_there, tree_iter((args, kwargs))))
        replace = lambda v: TO_GPU if is_device(v, "cuda") else TO_CPU if is_device(v, "cpu") else v
        try:
            return func(*tree_map(replace, args), **tree_map(replace, kwargs))
        finally:
            CALL.on_gpu = outer


def is_there(v):
    """Whether v is a tensor on the GPU, or one on which vmap works."""
    while isinstance(v, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v):
        v = torch._C._functorch.get_unwrapped(v)
    return isinstance(v, OnGPU) or hasattr(v, "pretends")


def is_device(v, kind):
    return isinstance(v, torch.device) and v.type == kind or isinstance(v, str) and re.fullmatch(rf"{kind}(:0)?", v) is not None


def stay(tensor, *args, **kwargs):
    """The arguments of tensor.to() for a tensor on the GPU: that it is to be there says nothing."""
    args, kwargs = [v for v in args if not is_device(v, "cuda")], {k: v for k, v in kwargs.items() if not is_device(v, "cuda")}
    return (tensor, *args), kwargs if args or kwargs else {"dtype": tensor.dtype}


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

    def is_capturing(self):
        return False


@contextlib.contextmanager
def pretended():
    """Inside, in this thread and those that start there, the machine has a GPU."""
    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "mem_get_info": lambda *_: (2**34, 2**35),
            "get_device_name": lambda *_: "a pretended GPU", "is_bf16_supported": lambda *_, **__: True, "_lazy_init": lambda: None,
            "memory_allocated": lambda *_: MEMORY.now, "max_memory_allocated": lambda *_: MEMORY.most,
            "reset_peak_memory_stats": lambda *_: MEMORY.start_again(), "synchronize": lambda *_: None, "empty_cache": lambda: None,
            "is_current_stream_capturing": lambda: False, "manual_seed_all": lambda seed: None, "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
            "Stream": Stream, "default_stream": Stream, "current_stream": Stream,
            "stream": contextlib.nullcontext, "device": contextlib.nullcontext, "device_of": contextlib.nullcontext}
    as_cpu = lambda ask: lambda device_type="cuda": ask("cpu" if device_type == "cuda" else device_type)
    top = {"Generator": Generator, "load": load, "autocast": Autocast, "is_autocast_enabled": as_cpu(torch.is_autocast_enabled),
           "get_autocast_dtype": as_cpu(torch.get_autocast_dtype)}
    run_thread = threading.Thread.run

    def run_inside(thread):
        with Calls(), Operators():
            run_thread(thread)

    with contextlib.ExitStack() as stack:
        for owner, names in ((torch.cuda, cuda), (torch, top), (torch.accelerator, {"current_stream": Stream}), (threading.Thread, {"run": run_inside})):
            stack.enter_context(mock.patch.multiple(owner, **names))
        torch.__future__.set_overwrite_module_params_on_conversion(True)         # a CPU's parameter can't become a wrapper
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Calls())
        stack.enter_context(Operators())
        yield


if __name__ == "__main__":
    import pretend_gpu                           # pickle finds what it names in a module, not in a script
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    with pretend_gpu.pretended():
        runpy.run_path(sys.argv[0], run_name="__main__")
