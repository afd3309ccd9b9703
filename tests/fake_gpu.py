"""Run the stages' own CUDA code without a GPU. CPU tensors are real, CUDA tensors have no data.

    import fake_gpu                                     # before torch: it tells torch of eight GPUs
    gpu = FakeGPU()
    with eight_gpus(gpu, rank=0), gpu:
        ...

1. A few lines of C++ tell torch that there are eight CUDA devices.
2. A dispatch mode hands every operation on CUDA tensors to torch's FakeTensorMode, which refuses to
   mix devices or dtypes as CUDA would. It notes the memory of storages, FLOPs, collectives, what
   makes the host wait (.item(), copies to the CPU, nonzero), and the least seconds that an H100
   would take (roofline.py).
3. Python's view of CUDA is patched where it would reach the driver. NCCL becomes a group of eight
   that talks to nobody.
"""
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
from collections import Counter
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parent

HOOKS = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct NoNumbers : at::CPUGeneratorImpl {
  explicit NoNumbers(c10::DeviceIndex i) : CPUGeneratorImpl(0) {
    device_ = c10::Device(c10::kCUDA, i);
  }
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
    return at::make_generator<NoNumbers>(std::max<int>(0, i));
  }
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::EightHooks) }
C10_REGISTER_GUARD_IMPL(CUDA, EightGuards)
"""


def load_hooks():
    """Compile HOOKS (2 to 3 s) and load them. torch must not have been imported yet."""
    assert "torch" not in sys.modules
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    command = ["g++", "-std=c++20", "-fPIC", "-shared", "hooks.cpp", "-o", "hooks.so",
               f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10",
               f"-Wl,-rpath,{torch_folder}/lib"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hooks.cpp").write_text(HOOKS)
        subprocess.run(command, cwd=folder, check=True)
        ctypes.CDLL(f"{folder}/hooks.so", mode=ctypes.RTLD_GLOBAL)


load_hooks()
sys.path.insert(0, str(TESTS.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from roofline import link, roof, roof_of_graph, work  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

aten = torch.ops.aten


def on_gpu(x):
    return isinstance(x, fake_tensor.FakeTensor)


class FakeGPU(TorchDispatchMode):
    """Notes the peak of memory and the FLOPs by phase; collectives and host waits in order."""

    def __init__(self):
        super().__init__()
        self.fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self.phase = "set-up"
        self.bytes = 0
        self.sizes = {}             # storage -> bytes
        self.peaks = Counter()      # phase -> bytes
        self.flops = Counter()      # phase -> FLOPs
        self.part = "rest"          # the part of a step that seconds are counted under
        self.seconds = Counter()    # part -> seconds
        self.fused = False          # inside a compiled graph, which is timed as a whole
        self.blind = False          # while torch asks for the shape of a result
        self.waits = []
        self.collectives = []
        self.step = 0
        self.graphs = []            # when each graph was compiled

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)   # torch.tensor(..., device="cuda") starts there
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    @classmethod
    def is_infra_mode(cls):
        return True                 # compiled code and autograd run under it as under none

    # ---------------------------------------------------------------------------------------------
    # Phases and parts

    @contextlib.contextmanager
    def during(self, phase):
        before = self.phase
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.bytes)
        try:
            yield
        finally:
            self.phase = before

    @contextlib.contextmanager
    def within(self, part):
        before = self.part
        self.part = part
        try:
            yield
        finally:
            self.part = before

    def unseen(self, function):
        """`function` without notes: DTensor runs operations on whole tensors to learn shapes."""
        def wrapped(*args, **kwargs):
            before = self.blind
            self.blind = True
            try:
                return function(*args, **kwargs)
            finally:
                self.blind = before
        return wrapped

    def as_phase(self, function, phase):
        def wrapped(*args, **kwargs):
            with self.during(phase):
                return function(*args, **kwargs)
        return wrapped

    def as_part(self, function, part):
        def wrapped(*args, **kwargs):
            with self.within(part):
                return function(*args, **kwargs)
        return wrapped

    # ---------------------------------------------------------------------------------------------
    # What is noted

    def hold(self, storage, size):
        """`storage` takes `size` bytes from now on, until it is gone or takes another size."""
        key = storage._cdata
        size = -(-size // 512) * 512
        if key not in self.sizes:
            weakref.finalize(storage, self.free, key)
        self.bytes += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.bytes)

    def free(self, key):
        self.bytes -= self.sizes.pop(key, 0)

    def wait(self, reason):
        """Note the line of the project that waits."""
        frame = sys._getframe(2)
        while frame:
            file = Path(frame.f_code.co_filename)
            if TESTS.parent in file.parents and TESTS not in file.parents:
                reason = f"{reason} at {file.name}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.waits.append(reason)

    def count(self, func, args, kwargs, out):
        name = func._overloadpacket.__name__
        flops = work(func, args, kwargs, out)
        self.flops[self.phase] += flops
        if func.namespace == "c10d":
            size = sum(x.numel() for x in tree_leaves(args) if torch.is_tensor(x))
            self.collectives.append(f"{name} {size}")
            self.seconds[name.strip("_")] += link(name, args)
            return
        is_kernel = func.namespace == "aten" and not func.is_view and "empty" not in name
        if is_kernel and not self.fused:
            self.seconds[self.part] += roof(func, flops, (args, kwargs, out))

    def compiled(self, honest, graph, inputs):
        """What torch.compile gets for a graph: it runs as it is, but is timed as if fused."""
        seconds = roof_of_graph(graph.graph)
        run = honest(graph, inputs)

        def fused(args):
            self.seconds[self.part] += seconds
            before = self.fused
            self.fused = True
            try:
                return run(args)
            finally:
                self.fused = before
        fused._boxed_call = True
        return fused

    # ---------------------------------------------------------------------------------------------
    # What is done

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented                       # it will call its own shards
        leaves = tree_leaves((args, kwargs))
        devices = [x.type for x in leaves if isinstance(x, torch.device)]
        if "cuda" not in devices and not any(map(on_gpu, leaves)):
            return func(*args, **kwargs)
        answer = self.host_waits(func, args, kwargs)
        if answer is not NotImplemented:
            return answer
        if func is aten.copy_.default and not on_gpu(args[1]):          # from the CPU
            return args[0]
        if func is aten._to_copy.default and not on_gpu(args[0]):       # likewise
            func = aten.empty.memory_format
            dtype = kwargs.get("dtype") or args[0].dtype
            kwargs = {"dtype": dtype, "device": kwargs["device"]}
            args = (args[0].shape,)
        with self.fake:
            out = func(*args, **kwargs)
        if self.blind:
            return out
        if not func.is_view:
            self.note_storages(out)
        self.count(func, args, kwargs, out)
        return out

    def note_storages(self, out):
        for x in filter(on_gpu, tree_leaves(out)):
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes:
                self.hold(storage, storage.nbytes())

    def host_waits(self, func, args, kwargs):
        """The answer, full of zeros, to an operation whose result the host must see.
        NotImplemented for all others."""
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return torch.zeros((), dtype=args[0].dtype).item()
        to_cpu = kwargs.get("device") is not None and kwargs["device"].type == "cpu"
        if func is aten._to_copy.default and on_gpu(args[0]) and to_cpu:
            self.wait("copy to the CPU")
            shape = args[0].shape if args[0].numel() < 2 ** 20 else ()  # a model takes no memory
            zeros = torch.zeros(shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return zeros.expand(args[0].shape)
        if func is aten.copy_.default and not on_gpu(args[0]):
            self.wait("copy to the CPU")
            return args[0].zero_()
        if func is aten.bincount.default:
            self.wait("bincount")
            length = kwargs.get("minlength") or [*args, 1, 1][2]
            with self.fake:                             # as if no number were larger
                return args[0].new_empty(length)
        if func is aten.nonzero.default:
            self.wait("nonzero")
            with self.fake:                             # as if half of them were true
                return args[0].new_empty((args[0].numel() // 2, args[0].ndim), dtype=torch.int64)
        if func is aten.index.Tensor and is_mask(args[1][0]):
            self.wait("nonzero")
            mask = args[1][0]
            with self.fake:
                return args[0].new_empty((mask.numel() // 2, *args[0].shape[mask.ndim:]))
        return NotImplemented


def is_mask(index):
    return torch.is_tensor(index) and index.dtype == torch.bool


# -------------------------------------------------------------------------------------------------
# Python's view of CUDA

class Stream:
    """A CUDA stream or event. Nothing happens, so nothing has to be waited for."""
    device = torch.device("cuda:0")
    device_index = 0
    device_type = 1
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def nothing(self, *_, **__):
        return self

    wait_stream = wait_event = record_event = synchronize = record = wait = __enter__ = nothing
    __exit__ = nothing

    def query(self):
        return True

    def is_capturing(self):
        return False


def constant(value):
    return lambda *_, **__: value


def attention(real):
    """F.scaled_dot_product_attention with the kernels of an H100: flash, or with a mask the
    memory-efficient one. A CPU build would split it into products."""
    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.device.type != "cuda":
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                        enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cuda"):
            q = q.to(torch.bfloat16)
            k = k.to(torch.bfloat16)
            v = v.to(torch.bfloat16)
        if enable_gqa:
            groups = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(groups, 1)
            v = v.repeat_interleave(groups, 1)
        if attn_mask is None and q.dtype == torch.bfloat16:
            return aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, is_causal, False, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
            attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, q.requires_grad, 0.0, is_causal, scale=scale)[0]
    return sdpa


def cuda_patches(gpu):
    """Eight H100s without a driver."""
    about = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0,
                                  multi_processor_count=132, total_memory=80 * 2 ** 30)
    return {
        torch.cuda: dict(
            is_available=constant(True), is_initialized=constant(True), _lazy_init=constant(None),
            device_count=constant(8), current_device=constant(0), set_device=constant(None),
            synchronize=constant(None), get_device_name=constant(about.name),
            get_device_capability=constant((9, 0)), get_device_properties=constant(about),
            mem_get_info=constant((80 * 2 ** 30, 80 * 2 ** 30)), is_bf16_supported=constant(True),
            max_memory_allocated=lambda *_: gpu.peaks[gpu.phase],
            is_current_stream_capturing=constant(False), set_rng_state=constant(None),
            get_rng_state=lambda *_: torch.get_rng_state(), Stream=Stream, Event=Stream,
            current_stream=lambda *_: Stream(), stream=lambda _: contextlib.nullcontext(),
            _exchange_device=constant(0), _maybe_exchange_device=constant(0)),
        torch._C: dict(
            _cuda_getDevice=constant(0), _cuda_setDevice=constant(None),
            _cuda_exchangeDevice=constant(0), _cuda_maybeExchangeDevice=constant(0),
            _cuda_getCurrentRawStream=constant(0)),
        torch.accelerator: dict(current_stream=lambda *_: Stream()),
        torch.Tensor: dict(record_stream=constant(None)),
        fake_tensor: dict(init_gpu_context=constant(None))}


def torch_patches():
    """What would look at numbers, or take a CPU's way."""
    move = torch.nn.Module.to

    def to(module, *args, **kwargs):
        if any(map(on_gpu, module.parameters())):
            return module
        return move(module, *args, **kwargs)

    return {
        torch: dict(equal=lambda a, b: a.shape == b.shape, Stream=Stream, Event=Stream,
                    save=constant(None)),
        F: dict(scaled_dot_product_attention=attention(F.scaled_dot_product_attention)),
        torch.nn.Module: dict(to=to),
        fake_tensor.FakeTensor: dict(tolist=lambda x: x.cpu().tolist())}    # a single wait


def compile_patches(gpu):
    """torch.compile stops at graphs: gpu.compiled runs them."""
    from torch._dynamo.backends import debugging

    def backend(graph, inputs):                 # one object: all blocks share what is compiled
        gpu.graphs.append({"step": gpu.step, "phase": gpu.phase})
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    def compile_block(module, **options):
        call = torch.compile(module._call_impl, backend=backend, **options)
        module._compiled_call_impl = call

    return {
        torch.nn.Module: dict(compile=compile_block),
        debugging: dict(boxed_nop=functools.partial(gpu.compiled, debugging.boxed_nop))}


def group_patches(gpu, rank):
    """A process group of eight that talks to nobody, and FSDP's changes of a storage's size."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore
    join = dist.init_process_group
    free = _fsdp_param.free_storage
    alloc = _fsdp_param.alloc_storage
    shapes = ShardingPropagator._propagate_tensor_meta_non_cached

    def init_process_group(backend, **_):
        join("fake", store=FakeStore(), rank=rank, world_size=8)

    def free_storage(tensor):
        free(tensor)
        gpu.hold(tensor.untyped_storage(), 0)

    def alloc_storage(tensor):
        alloc(tensor)
        gpu.hold(tensor.untyped_storage(), tensor.nbytes)

    def objects(name):
        return lambda *_, **__: gpu.collectives.append(name)

    return {
        dist: dict(init_process_group=init_process_group,
                   broadcast_object_list=objects("broadcast_object_list"),
                   all_gather_object=objects("all_gather_object")),
        _fsdp_param: dict(free_storage=free_storage, alloc_storage=alloc_storage),
        ShardingPropagator: dict(_propagate_tensor_meta_non_cached=gpu.unseen(shapes))}


def model_patches():
    """The library and the project, where they would look at numbers."""
    import transformers.masking_utils
    from core import backbone, common
    honest = common.World.sum

    def total(world, values):                   # as if the others had nothing to add
        honest(world, values)
        return list(values)

    return {
        transformers.masking_utils: dict(       # one text a row
            is_tracing=constant(False), find_packed_sequence_indices=constant(None)),
        transformers.PreTrainedModel: dict(init_weights=lambda self: self.tie_weights()),
        backbone: dict(check=constant(None), check_wide=constant(None)),
        common.World: dict(sum=total)}


@contextlib.contextmanager
def eight_gpus(gpu, rank):
    """This process is `rank` of eight, each with an H100. One of these is `gpu`."""
    tables = [cuda_patches(gpu), torch_patches(), compile_patches(gpu), group_patches(gpu, rank),
              model_patches()]
    with contextlib.ExitStack() as stack:
        place = dict(RANK=str(rank), WORLD_SIZE="8", LOCAL_RANK="0", MASTER_ADDR="fake")
        stack.enter_context(mock.patch.dict(os.environ, place))
        for table in tables:
            for target, names in table.items():
                for name, value in names.items():
                    stack.enter_context(mock.patch.object(target, name, value, create=True))
        torch._dynamo.reset()
        yield stack
        if dist.is_initialized():
            dist.destroy_process_group()
