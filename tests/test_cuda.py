"""On a GPU: streams, graphs, NCCL with one rank, the hook for DDP, and ranks that share the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from hvd_gqsgd import GlobalQSGD, allreduce, build_info, ddp_hook, layout, simulate
from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench import gpu
from hvd_gqsgd.codecs import CodeKind
from hvd_gqsgd.engine.pipeline import Pipeline

pytestmark = pytest.mark.cuda

OPTIONS = [
    {},
    {"bits": 4},
    {"bits": 6, "block_size": 1500},
    {"norm": "l2", "block_size": None},
    {"exchange": "two_phase"},
    {"dither": "exponential"},
    {"dither": "exponential", "bits": 4, "block_size": 64},
]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone, over NCCL."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    assert isinstance(dist.group.WORLD, dist.ProcessGroup)
    yield dist.group.WORLD
    dist.destroy_process_group()


def rows(ranks: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients of some ranks, heavy-tailed."""
    generator = torch.Generator().manual_seed(numel)
    normal = torch.randn(ranks, numel, generator=generator)
    return (normal * torch.randn(numel, generator=generator).exp()).to(dtype)


def late(x: Tensor) -> Tensor:
    """A copy on the GPU that takes some milliseconds: who does not wait finds something else."""
    made = torch.full_like(x, 1e6, device="cuda")
    torch.cuda._sleep(20_000_000)
    return made.copy_(x.pin_memory(), non_blocking=True)


def test_what_is_built() -> None:
    assert {"cuda", "nccl"} <= set(build_info()["parts"])
    assert native_nccl.built()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_simulate(options: dict) -> None:
    """The same bits as on the CPU."""
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(3, 10_001, dtype)
        assert torch.equal(simulate(x.cuda(), **options).cpu(), simulate(x, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nccl(group: dist.ProcessGroup, options: dict) -> None:
    """The whole exchange, and its order with what comes before and after on the stream."""
    for numel in (0, 1, 1_000_003):
        x = rows(1, numel)
        mean = simulate(x, step=5, **options)
        for _ in range(2):
            found = allreduce(late(x[0]), group, step=5, **options)
            assert torch.equal(found.cpu(), mean)
        out = torch.empty(numel, device="cuda")
        assert allreduce(x[0].cuda(), group, out=out, step=5, **options) is out
        assert torch.equal(out.cpu(), mean)


def test_the_host_waits_for_nothing(group: dist.ProcessGroup) -> None:
    x = torch.ones(100_000, device="cuda")
    for options in OPTIONS:
        allreduce(x, group, **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = allreduce(x, group, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.isfinite().all()


def test_other_streams(group: dist.ProcessGroup) -> None:
    """On a stream of the user's, beside work on others."""
    x = rows(1, 1_000_003)
    mean = simulate(x, step=5)
    results = []
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = allreduce(late(x[0]), group, step=5)
            results.append(found * 2)  # on the same stream
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result.cpu(), mean * 2)


def test_graphs() -> None:
    """Kernels and the exchange over NCCL can be captured, and give the same when replayed."""
    numel, device = 100_001, torch.device("cuda", torch.cuda.current_device())
    communicator = native_nccl.communicator(native_nccl.unique_id(), 0, 1, device)
    x, out = (torch.zeros(numel, device=device) for _ in range(2))
    norms = torch.zeros(-(-numel // 1024), dtype=torch.int32, device=device)
    words = torch.zeros(layout.words_for(numel, 1024, 8), dtype=torch.int32, device=device)
    code = (1024, CodeKind.LINEAR, 8, 127)
    place = (*code, 1, 2, 3, True, 1.0)
    communicator.allreduce(x, out, norms, None, words, *place)  # NCCL allocates at first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        communicator.allreduce(x, out, norms, None, words, *place)
    for seed in range(2):
        x.copy_(rows(1, numel + seed)[0, :numel])
        graph.replay()
        expected = torch.empty(numel)
        host = x.cpu(), norms.cpu().zero_(), words.cpu().zero_(), expected
        ops.block_max(host[0], 1024, host[1])
        ops.quantize(host[0], host[1], host[2], *code, 1, 2, 3, 0, 1, True)
        ops.dequantize(host[2], host[1], expected, *code, 1, 1.0)
        assert torch.equal(out.cpu(), expected)


def model() -> nn.Sequential:
    """A small one, on the GPU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).cuda()


def gradient(network: nn.Module) -> Tensor:
    """Of all parameters, flat."""
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def test_ddp(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are near those of the model alone, and an overflow skips the scaler's step; who
    does not wait for the decoding finds them as they were."""
    decode = Pipeline.decode

    def decode_late(*args: Any) -> Tensor:
        torch.cuda._sleep(50_000_000)
        return decode(*args)

    monkeypatch.setattr(Pipeline, "decode", decode_late)
    plain = model()
    ddp = nn.parallel.DistributedDataParallel(model(), device_ids=[torch.cuda.current_device()])
    state = GlobalQSGD(bits=8, min_numel=1).ddp_state()
    ddp.register_comm_hook(state, ddp_hook)
    inputs = torch.randn(64, 256, device="cuda")
    for _ in range(3):
        for network in (plain, ddp):
            network.zero_grad()
            network(inputs).square().mean().backward()
        exact, found = gradient(plain), gradient(ddp)
        assert (exact - found).abs().max() <= exact.abs().max() / 127
        assert not torch.equal(exact, found)

    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for bad in (True, False):
        before = [p.detach().clone() for p in ddp.parameters()]
        optimizer.zero_grad()
        loss = ddp(inputs).square().mean() * (torch.inf if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))
        assert same == bad
    assert scaler.get_scale() == 2.0**9
    state.close()


def test_ranks_that_share_a_gpu(tmp_path: Path) -> None:
    """Over Gloo, by way of the host's memory."""
    torch.multiprocessing.spawn(_share, (str(tmp_path / "store"),), nprocs=2)


def _share(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    for options in OPTIONS:
        everyone = rows(2, 50_000)
        found = allreduce(late(everyone[rank]), dist.group.WORLD, step=1, **options)
        assert torch.equal(found.cpu(), simulate(everyone, step=1, **options)), options
    ddp = nn.parallel.DistributedDataParallel(model())
    ddp.register_comm_hook(GlobalQSGD(bits=8, min_numel=1).ddp_state(), ddp_hook)
    ddp(torch.full((4, 256), float(rank), device="cuda")).square().mean().backward()
    found = gradient(ddp).cpu()
    others = [torch.empty_like(found) for _ in range(2)]
    dist.all_gather(others, found)
    assert torch.equal(*others) and found.isfinite().all() and found.any()
    dist.barrier()
    dist.destroy_process_group()


def test_horovod() -> None:
    """Whatever Horovod was built for."""
    hvd = pytest.importorskip("horovod.torch")
    hvd.init()
    x = rows(1, 100_000)
    found = hvd.allreduce(late(x[0]), name="gpu", compression=GlobalQSGD(bits=8))
    assert torch.equal(found.cpu(), simulate(x, bits=8))


def test_devices_must_match() -> None:
    x, norms = torch.ones(1024, device="cuda"), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="norms must be on cuda:0, got one on cpu"):
        ops.block_max(x, 1024, norms)


def test_bench() -> None:
    result = gpu.measure(2**20, 8, torch.float32, 1024, repeats=3)
    assert result["times_plain_torch"] > 0 and result["allreduce_ms"] > 0
    assert all(speed["share_of_copy"] > 0 for speed in result["passes"].values())
    gpu.show(result)
