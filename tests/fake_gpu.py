"""fake_gpu.py: run the stages' own CUDA code without a GPU. CPU tensors are real; CUDA tensors have a shape, no data.

    import fake_gpu                                   # before torch: it tells torch of GPUs (fake_scenes.py)
    with eight_gpus(gpu := FakeGPU(), rank=0), gpu: ...

How: 1 a few lines of C++ tell torch that there are eight CUDA devices, before torch is imported  2 a dispatch mode
hands every operation on CUDA tensors to torch's FakeTensorMode, which refuses to mix devices or dtypes as CUDA would,
and notes storages (memory), FLOPs, collectives, what makes the host wait (.item(), copies to the CPU, nonzero), and the
seconds that an H100 would take at least (roofline.py)
3 Python's view of CUDA is patched where it would reach the driver; NCCL becomes a group of eight that talks to nobody.
"""
import collections
import contextlib
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path
from unittest import mock

HOOKS = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct NoDraws : at::CPUGeneratorImpl {
  explicit NoDraws(c10::DeviceIndex i) : CPUGeneratorImpl(0) { device_ = c10::Device(c10::kCUDA, i); }
};
struct EightGuards : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 8; }
  c10::Stream getStream(c10::Device d) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kCUDA, std::max<int>(0, d.index())));
  }
};
struct EightHooks : at::CUDAHooksInterface {
  explicit EightHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override {
    return at::make_generator<NoDraws>(std::max<int>(0, i));
  }
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::EightHooks) }
C10_REGISTER_GUARD_IMPL(CUDA, EightGuards)
"""


def load_hooks():
    """Compile HOOKS (2 to 3 s) and load them: torch must not have been imported yet."""
    assert "torch" not in sys.modules
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hooks.cpp").write_text(HOOKS)
        subprocess.run(["g++", "-std=c++20", "-fPIC", "-shared", "hooks.cpp", "-o", "hooks.so",
                        f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10",
                        f"-Wl,-rpath,{torch_folder}/lib"], cwd=folder, check=True)
        ctypes.CDLL(f"{folder}/hooks.so", mode=ctypes.RTLD_GLOBAL)


load_hooks()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from roofline import link, roof, roof_of_graph, work  # noqa: E402

aten = torch.ops.aten


def on_gpu(x):
    return isinstance(x, fake_tensor.FakeTensor)


class FakeGPU(TorchDispatchMode):
    """Notes, by phase (`phase`): peak bytes, FLOPs; in order: collectives, and where the host waited."""

    def __init__(self):
        super().__init__()
        self.fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self.phase, self.bytes, self.sizes = "set-up", 0, {}
        self.peaks, self.flops, self.seconds = (collections.Counter() for _ in range(3))
        self.part, self.fused = "rest", False          # of a step: what its seconds are counted under
        self.waits, self.collectives, self.graphs = [], [], []

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)      # torch.tensor(..., device="cuda") comes here as a CPU tensor
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    @classmethod
    def is_infra_mode(cls):
        return True                                    # compiled code and autograd run under it as under none

    # ------------------------------------------------------------------------------------------------ what is noted
    def hold(self, storage, size):
        """`storage` takes `size` bytes from now on, until it is gone or takes another size."""
        key, size = storage._cdata, -(-size // 512) * 512
        if key not in self.sizes:
            weakref.finalize(storage, self.free, key)
        self.bytes += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.bytes)

    def free(self, key):
        self.bytes -= self.sizes.pop(key, 0)

    def wait(self, what):
        frame, tests = sys._getframe(2), str(Path(__file__).parent)
        while frame and (not (file := frame.f_code.co_filename).startswith(os.path.dirname(tests))
                         or file.startswith(tests)):
            frame = frame.f_back
        self.waits.append(f"{what} at {os.path.basename(file)}:{frame.f_lineno}" if frame else what)

    def count(self, func, args, kwargs, out):
        name, flops = func._overloadpacket.__name__, work(func, args, kwargs, out)
        self.flops[self.phase] += flops
        if func.namespace == "c10d":
            self.collectives.append(f"{name} {sum(x.numel() for x in tree_leaves(args) if torch.is_tensor(x))}")
            self.seconds[name.strip("_")] += link(name, args)
        elif func.namespace == "aten" and not self.fused and not func.is_view and "empty" not in name:
            self.seconds[self.part] += roof(func, flops, (args, kwargs, out))

    @contextlib.contextmanager
    def during(self, phase):
        before, self.phase = self.phase, phase
        self.peaks[phase] = max(self.peaks[phase], self.bytes)
        yield
        self.phase = before

    def part_of_step(self, function, part):
        def within(*args, **kwargs):
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before
        return within

    def compiled(self, honest, graph, inputs):
        """What torch.compile gets for a graph: it is run as it is, and timed as if it were fused."""
        seconds, run = roof_of_graph(graph.graph), honest(graph, inputs)

        def fused(args):
            self.seconds[self.part] += seconds
            before, self.fused = self.fused, True
            try:
                return run(args)
            finally:
                self.fused = before
        fused._boxed_call = True
        return fused

    def timed(self, function, phase):
        def within(*args, **kwargs):
            with self.during(phase):
                return function(*args, **kwargs)
        return within

    # ------------------------------------------------------------------------------------------------ what is done
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented                      # it will call its own shards
        leaves = tree_leaves((args, kwargs))
        if not any(on_gpu(x) or isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return func(*args, **kwargs)
        if (answer := self.host_waits(func, args, kwargs)) is not NotImplemented:
            return answer
        if func is aten.copy_.default and not on_gpu(args[1]):                   # from the CPU
            return args[0]
        if func is aten._to_copy.default and not on_gpu(args[0]):
            func, args, kwargs = aten.empty.memory_format, (args[0].shape,), {
                "dtype": kwargs.get("dtype") or args[0].dtype, "device": kwargs["device"]}
        with self.fake:
            out = func(*args, **kwargs)
        for x in () if func.is_view else tree_leaves(out):
            if on_gpu(x) and x.untyped_storage()._cdata not in self.sizes:
                self.hold(x.untyped_storage(), x.untyped_storage().nbytes())
        self.count(func, args, kwargs, out)
        return out

    def host_waits(self, func, args, kwargs):
        """The answer (zeros) to an operation whose result the host must see; NotImplemented for all others."""
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return torch.zeros((), dtype=args[0].dtype).item()
        to_cpu = kwargs.get("device") is not None and kwargs["device"].type == "cpu"
        if func is aten._to_copy.default and on_gpu(args[0]) and to_cpu:
            self.wait("copy to the CPU")
            shape = args[0].shape if args[0].numel() < 2 ** 20 else ()           # a whole model takes no memory
            zeros = torch.zeros(shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return zeros.expand(args[0].shape)
        if func is aten.copy_.default and not on_gpu(args[0]):
            self.wait("copy to the CPU")
            return args[0].zero_()
        if func is aten.bincount.default:
            self.wait("bincount")
            with self.fake:                                                      # as if no number were larger
                return args[0].new_empty(kwargs.get("minlength") or [*args, 1, 1][2])
        picks = args[1] if func is aten.index.Tensor else ()
        picks = [x for x in picks if torch.is_tensor(x) and x.dtype == torch.bool]
        if func is aten.nonzero.default or picks:
            self.wait("nonzero")
            with self.fake:                                                      # as if half of them were true
                if not picks:
                    return args[0].new_empty((args[0].numel() // 2, args[0].ndim), dtype=torch.int64)
                rest = args[0].shape[picks[0].ndim:]
                return args[0].new_empty((picks[0].numel() // 2, *rest))
        return NotImplemented


# ------------------------------------------------------------------------------------------- Python's view of CUDA
class Stream:
    """A CUDA stream or event: nothing happens, so nothing has to be waited for."""
    device, device_index, device_type, stream_id, cuda_stream = torch.device("cuda:0"), 0, 1, 0, 0

    def __init__(self, *_, **__):
        pass

    def nothing(self, *_, **__):
        return self

    wait_stream = wait_event = record_event = synchronize = record = wait = __enter__ = __exit__ = nothing

    def query(self):
        return True

    def is_capturing(self):
        return False


def attention(real):
    """F.scaled_dot_product_attention, which a CPU build would take apart on a fake tensor: flash, or with a mask the
    memory-efficient kernel, as an H100 would."""
    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.device.type != "cuda":
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if attn_mask is None and q.dtype == torch.bfloat16:
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, q.requires_grad, 0.0, is_causal,
                                                            scale=scale)[0]
    return sdpa


@contextlib.contextmanager
def eight_gpus(gpu, rank):
    """This process is `rank` of eight, each with an H100, one of which is `gpu`."""
    import transformers.masking_utils
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch._dynamo.backends import debugging
    from core import backbone, common, run
    honest_total = common.World.sum
    join, free, alloc, to = (dist.init_process_group, _fsdp_param.free_storage, _fsdp_param.alloc_storage,
                             torch.nn.Module.to)
    about = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
                                  total_memory=80 * 2 ** 30)

    def objects(what):
        return lambda objects, *_, **__: gpu.collectives.append(what)

    def backend(graph, inputs):                        # one for all blocks: they share what is compiled
        gpu.graphs.append(gpu.step)
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    def compile_block(module, **how):
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, **how)

    def total(world, values):                          # as if the others had nothing to add
        honest_total(world, values)
        return list(values)

    patches = {
        torch.cuda: dict(is_available=lambda: True, is_initialized=lambda: True, _lazy_init=lambda: None,
                         device_count=lambda: 8, current_device=lambda: 0, set_device=lambda d: None,
                         synchronize=lambda d=None: None, get_device_name=lambda d=None: about.name,
                         get_device_capability=lambda d=None: (9, 0), get_device_properties=lambda d=None: about,
                         max_memory_allocated=lambda d=None: gpu.peaks[gpu.phase],
                         mem_get_info=lambda d=None: (80 * 2 ** 30, 80 * 2 ** 30),
                         is_bf16_supported=lambda *_, **__: True,
                         is_current_stream_capturing=lambda: False, get_rng_state=lambda *_: torch.get_rng_state(),
                         set_rng_state=lambda *_: None, Stream=Stream, Event=Stream, current_stream=lambda *_: Stream(),
                         stream=lambda s: contextlib.nullcontext(), _exchange_device=lambda d: 0,
                         _maybe_exchange_device=lambda d: 0),
        torch._C: dict(_cuda_getDevice=lambda: 0, _cuda_setDevice=lambda d: None, _cuda_exchangeDevice=lambda d: 0,
                       _cuda_maybeExchangeDevice=lambda d: 0, _cuda_getCurrentRawStream=lambda d: 0),
        backbone: dict(check=lambda lm: None, check_wide=lambda lm: None),       # fakes hold no numbers to compare
        torch: dict(equal=lambda a, b: a.shape == b.shape, Stream=Stream, Event=Stream,
                    save=lambda state, file: Path(file).touch()),
        torch.accelerator: dict(current_stream=lambda *_: Stream()), torch.Tensor: dict(record_stream=lambda *_: None),
        F: dict(scaled_dot_product_attention=attention(F.scaled_dot_product_attention)),
        torch.nn.Module: dict(compile=compile_block, to=lambda module, *where, **how: module if any(
            map(on_gpu, module.parameters())) else to(module, *where, **how)),
        dist: dict(init_process_group=lambda backend, **_: join("fake", store=FakeStore(), rank=rank, world_size=8),
                   broadcast_object_list=objects("broadcast_object_list"),
                   all_gather_object=objects("all_gather_object")),
        fake_tensor: dict(init_gpu_context=lambda device: None),
        debugging: dict(boxed_nop=functools.partial(gpu.compiled, debugging.boxed_nop)),
        _fsdp_param: dict(
            free_storage=lambda t: (free(t), gpu.hold(t.untyped_storage(), 0)),
            alloc_storage=lambda t: (alloc(t), gpu.hold(t.untyped_storage(), t.numel() * t.itemsize))),
        transformers.masking_utils: dict(is_tracing=lambda t=None: False,        # texts that lie whole, one a row
                                         find_packed_sequence_indices=lambda positions: None),
        transformers.PreTrainedModel: dict(init_weights=lambda self: self.tie_weights()),      # seconds, for no data
        common: dict(stay_together=lambda: None), common.World: dict(sum=total),
        run: dict(refuse_unshared=lambda out: None)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE="8", LOCAL_RANK="0"))
        for thing, names in patches.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(thing, name, value, create=True))
        gpu.step = 0
        torch._dynamo.reset()
        yield stack
        if dist.is_initialized():
            dist.destroy_process_group()
