"""A simulated accelerator. Its tensors report the device `sim:0` and keep their values in CPU memory.

Programs run on it with --accel on any machine. It refuses what a GPU refuses: operands on two devices, `.numpy()` of a
device tensor, a generator of another device, and loading a device tensor where the device does not exist. Like Apple's
MPS it has no float64, unless the test asks for it.

    with simulated.accelerator(free=10**9):
        dcgan.main(["--accel", ...])

Not simulated: torch.compile, streams and graphs, several processes, and code that asks for the device type "cuda".

Import this module before the first backward pass of the process: autograd counts the devices only then.
"""

import contextlib
import weakref

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# PyTorch knows one accelerator at a time, so a real one excludes the simulated one.
SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
SUPPORTED = SUPPORTED and not torch.accelerator.is_available()


class Module(getattr(backend_registration, "_DummyBackendModule", object)):
    """The module `torch.sim`."""

    present = False  # True inside `accelerator`

    def is_available(self):
        return self.present

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register():
    """Register the device with PyTorch. Return the libraries, which must live as long as the process."""
    backend_registration._setup_privateuseone_for_python_backend("sim", backend_module=Module())
    torch.serialization.register_package(5, lambda storage: getattr(storage, "location", None), lambda *_: None)
    every, aten = (torch.library.Library(namespace, "IMPL") for namespace in ("_", "aten"))

    # torch.tensor(..., device=DEVICE) calls these three without going through `dispatch`.
    def empty(size, *, dtype=None, memory_format=None, **_):
        return Simulated(torch.empty(size, dtype=dtype, memory_format=memory_format))

    def empty_strided(size, stride, *, dtype=None, **_):
        return Simulated(torch.empty_strided(size, stride, dtype=dtype))

    def copy(target, source, non_blocking=False):
        cpu_argument(target).copy_(cpu_argument(source))
        return target

    for name, kernel in (("empty.memory_format", empty), ("empty_strided", empty_strided), ("copy_", copy)):
        aten.impl(name, kernel, "PrivateUse1")

    # Autocast runs convolutions in bfloat16 and leaves all else as it is.
    key = torch._C.DispatchKey.AutocastPrivateUse1
    every.fallback(torch.library.fallthrough_kernel, key.name)

    def in_bfloat16(convolve):
        def run(x, weight, *others):
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return convolve(x.bfloat16(), weight.bfloat16(), *others)

        return run

    aten.impl("conv2d", in_bfloat16(torch.conv2d), key.name)
    aten.impl("conv_transpose2d.input", in_bfloat16(torch.conv_transpose2d), key.name)
    return every, aten


if SUPPORTED:
    LIBRARIES = register()
    DEVICE = torch.device("sim:0")


class Simulated(torch.Tensor):
    """A tensor on DEVICE. Its values are in `cpu_tensor`."""

    float64 = False  # whether the device has this type

    @staticmethod
    def __new__(cls, cpu_tensor):
        if cpu_tensor.dtype == torch.float64 and not cls.float64:
            raise TypeError(f"{DEVICE} has no float64")
        like = {name: getattr(cpu_tensor, name) for name in ("dtype", "layout", "requires_grad")}
        like |= {"strides": cpu_tensor.stride(), "storage_offset": cpu_tensor.storage_offset(), "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, cpu_tensor.size(), **like)

    def __init__(self, cpu_tensor):
        self.cpu_tensor = cpu_tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu_tensor.numpy()

    def tolist(self):
        return self.cpu_tensor.tolist()

    def __repr__(self, **_):
        return f"{self.cpu_tensor!r} on {DEVICE}"

    def __format__(self, spec):
        return format(self.cpu_tensor, spec)

    def __reduce_ex__(self, protocol):
        """Make torch.save record the device of this tensor, as it does for a GPU's."""
        self.cpu_tensor.untyped_storage().location = str(DEVICE)
        return self.cpu_tensor.__reduce_ex__(protocol)


class Generator(torch.Generator):
    """Replaces torch.Generator. On DEVICE it draws the CPU's random numbers; its state has a size of its own."""

    made = weakref.WeakValueDictionary()  # those on DEVICE, by the address that operators see
    device = property(lambda self: DEVICE)

    def __new__(cls, device="cpu"):
        if torch.device(device).type == "cpu":
            return cls.__base__(device)
        self = super().__new__(cls)
        cls.made[self._cdata] = self
        return self

    def get_state(self):
        return torch.cat([super().get_state(), torch.ones(1, dtype=torch.uint8)])

    def set_state(self, state):
        if state.shape != self.get_state().shape:
            raise RuntimeError("this is the state of a generator on another device")
        return super().set_state(state[:-1].clone())


class Mode(TorchDispatchMode):
    """Sends operators on CPU tensors through `dispatch` as well."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def is_simulated(x):
    return isinstance(x, Simulated)


def cpu_argument(x):
    """Return the argument that the CPU's operator gets in place of x."""
    return x.cpu_tensor if is_simulated(x) else torch.device("cpu") if isinstance(x, torch.device) else x


def dispatch(function, args, kwargs):
    """Check the arguments of an operator as a GPU would, then run it on the CPU."""
    name, returns = function.name().removeprefix("aten::").split(".")[0], function._schema.returns
    on_device = any(map(is_simulated, tree_leaves((args, kwargs))))
    if on_device:
        check_operands(function, name, args, kwargs)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == "sim"
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.made) != on_device:
        raise RuntimeError(f"{name}: the generator is not on the device of the result")
    if name == "is_pinned":
        return getattr(args[0], "pinned", False)
    if name == "_pin_memory":
        if on_device:
            raise RuntimeError("cannot pin a tensor of sim, only dense CPU tensors can be pinned")
        copied = args[0].clone()
        copied.pinned = True
        return copied

    out = function(*tree_map(cpu_argument, args), **tree_map(cpu_argument, kwargs))
    if returns and returns[0].alias_info and returns[0].alias_info.is_write:  # in place, or with out=
        return kwargs.get("out", args[0])
    return tree_map(lambda x: Simulated(x) if isinstance(x, torch.Tensor) and on_device else x, out)


def check_operands(function, name, args, kwargs):
    """Raise RuntimeError for a CPU tensor among simulated ones, unless a GPU accepts it there too."""
    if name in ("_to_copy", "copy_"):
        return
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and is_simulated(args[0]):
        args = (args[0], *args[2:])  # indices may be on the CPU
    takes_scalars = torch.Tag.pointwise in function.tags or name in ("fill_", "masked_fill", "masked_fill_")
    target = args[0] if name.endswith("_") else None
    for x in tree_leaves((args, kwargs)):
        is_scalar = takes_scalars and x is not target and isinstance(x, torch.Tensor) and x.dim() == 0
        if isinstance(x, torch.Tensor) and not is_simulated(x) and not is_scalar:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu")


@contextlib.contextmanager
def accelerator(free=None, float64=False):
    """Make DEVICE the accelerator that PyTorch finds.

    free: the bytes of free memory that it reports; None: it cannot report them. float64: whether it has this type.
    """

    def get_memory_info(device=None):
        if free is None:
            raise RuntimeError(f"{DEVICE} cannot report its free memory")
        return free, max(free, 2**34)

    with pytest.MonkeyPatch.context() as patch, Mode():
        patch.setattr(Module, "present", True)
        patch.setattr(Simulated, "float64", float64)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.accelerator, "get_memory_info", get_memory_info, raising=False)
        yield DEVICE
