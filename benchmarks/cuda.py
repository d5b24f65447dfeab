"""The CUDA kernels against what the card's memory gives (a copy of the same number of bytes), eager PyTorch and
torch.compile. `make gpu` runs it on its own; every case also runs on the CPU, small, for its tests."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import attack
from blokern import models, ops
from blokern._race import Case, Row, pretty, report, run_case, wall_time
from blokern.attack import PGD
from blokern.ops import reference_curvature as reference

Rivals = dict[str, Callable[[], object]]
OURS, EAGER, COMPILED, COPY = "blokern", "eager", "torch.compile", "copy of as many bytes"


def device_time(run: Callable[[], object], repeats: int) -> float:
    """Seconds a call, by the device's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def streaming(name: str, tensors: int, like: Tensor, against: Rivals) -> Case:
    """A case that cannot do with less than `tensors` trips of one like `like` to memory."""
    count = tensors * like.numel() * like.element_size()
    source = torch.empty(count // 2, dtype=torch.uint8, device=like.device)
    target = torch.empty_like(source)
    return Case(name, against | {COPY: lambda: target.copy_(source)}, OURS, count)


def rivals(
    arguments: tuple[object, ...],
    ours: Callable[..., object],
    eager: Callable[..., object] | None = None,
    *,
    compiles: bool = False,
) -> Rivals:
    """Of the same arguments. compiles: eager's formula also compiled."""
    found: Rivals = {OURS: lambda: ours(*arguments)}
    if eager is not None:
        found[EAGER] = lambda: eager(*arguments)
    if eager is not None and compiles:
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        found[COMPILED] = lambda: compiled(*arguments)
    return found


def attack_cases(device: torch.device, small: bool) -> Iterator[Case]:
    for shape in [(2, 3, 8, 8)] if small else [(64, 3, 224, 224), (128, 3, 32, 32)]:
        label = "×".join(map(str, shape))
        for dtype in (torch.float32, torch.bfloat16):
            x, x_adv, grad = _images(shape, dtype, device)
            for norm, eager in (("linf", attack.linf_bounds), ("l2", attack.l2_torchattacks)):
                eps, step = attack.SIZES[norm]
                against = rivals(
                    (x_adv, x, grad, step, eps),
                    partial(ops.pgd_step_, norm=norm),
                    eager,
                    compiles=dtype == torch.float32,
                )
                yield streaming(f"pgd_step {norm}, {label}, {str(dtype)[6:]}", 4, x, against)
        x, x_adv, grad = _images(shape, torch.float32, device)
        eps, step = attack.SIZES["l1"]
        against = rivals((x_adv, x, grad, step, eps), partial(ops.pgd_step_, norm="l1"))
        yield streaming(f"pgd_step l1, {label}", 4, x, against)
        eps, step = attack.SIZES["linf"]
        against = rivals((x_adv, x.clone(), x, grad, step, eps), ops.apgd_step_, attack.apgd_autoattack)
        yield streaming(f"apgd_step linf, {label}", 6, x, against)
        against = rivals((x_adv - x, x, grad, step, eps), ops.fast_bat_step, attack.fast_bat_released)
        yield streaming(f"fast_bat_step, {label}", 4, x, against)
        against = rivals((x, eps), ops.random_start, attack.random_start_torch)
        yield streaming(f"random_start linf, {label}", 2, x, against)


def _images(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x, x_adv around it, and a gradient."""
    x = torch.rand(shape, device=device)
    x_adv = (x + 0.02 * torch.randn_like(x)).clamp(0, 1)
    return x.to(dtype), x_adv.to(dtype), torch.randn(shape, device=device, dtype=dtype)


def gelu_bars(grad: Tensor, grad_dot: Tensor, x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """φ′ ġ + φ″ ẋ g of a GELU, and φ′ g, as one writes it."""
    bell = torch.exp(-0.5 * x * x) * 0.3989422804014327
    first = 0.5 * torch.erfc(-x * 0.7071067811865476) + x * bell
    return first * grad, first * grad_dot + (2.0 - x * x) * bell * x_dot * grad


def curvature_cases(device: torch.device, small: bool) -> Iterator[Case]:
    for rows, classes in [(3, 7)] if small else [(1024, 1000), (4096, 32000)]:
        logits, tangent = _draws((rows, classes), device, 2)
        target = torch.randint(classes, (rows,), device=device)
        against = rivals(
            (logits, tangent, target),
            ops.softmax_cross_entropy_hvp,
            reference.softmax_cross_entropy_hvp,
            compiles=True,
        )
        yield streaming(f"softmax_cross_entropy_hvp, {rows}×{classes}", 4, logits, against)
    shape = (2, 5, 12) if small else (64, 197, 3072)
    bars = _draws(shape, device, 4)
    gelu = partial(ops.activation_adjoint_tangent, "gelu", adjoint=True)
    label = "×".join(map(str, shape))
    yield streaming(
        f"activation_adjoint_tangent gelu, {label}", 6, bars[0], rivals(bars, gelu, gelu_bars, compiles=True)
    )
    shape = (3, 4, 5, 2) if small else (64, 256, 56, 56)
    label = "×".join(map(str, shape))
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        g, g_dot, x, x_dot = (t.contiguous(memory_format=layout) for t in _draws(shape, device, 4))
        mean, rstd = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
        against = rivals(
            (g, g_dot, x, x_dot, mean, rstd, torch.ones_like(mean)),
            partial(ops.batch_norm_adjoint_tangent, adjoint=True),
            partial(reference.batch_norm_adjoint_tangent, adjoint=True),
        )
        yield streaming(f"batch_norm_adjoint_tangent, {label}, {name}", 6, x, against)
    shape = (6, 9) if small else (64 * 197, 768)
    g, g_dot, x, x_dot = _draws(shape, device, 4)
    mean, rstd = x.mean(1), (x.var(1, correction=0) + 1e-5).rsqrt()
    against = rivals(
        (g, g_dot, x, x_dot, mean, rstd, torch.ones(1, shape[1], device=device)),
        partial(ops.layer_norm_adjoint_tangent, adjoint=True),
        partial(reference.layer_norm_adjoint_tangent, adjoint=True),
    )
    yield streaming(f"layer_norm_adjoint_tangent, {shape[0]}×{shape[1]}", 6, x, against)


def _draws(shape: tuple[int, ...], device: torch.device, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=device) for _ in range(count))


def list_cases(device: torch.device, small: bool) -> Iterator[Case]:
    shapes = [(1, 7), (1, 3, 3)] if small else [(1, 512, 512, 3, 3)] * 4 + [(1, 512)] * 20
    lists = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(4)]
    alpha = torch.full((1,), 1e-3, dtype=torch.float64, device=device)

    def foreach() -> Tensor:
        x, r, p, ap = lists
        torch._foreach_add_(x, p, alpha=1e-3)
        torch._foreach_add_(r, ap, alpha=-1e-3)
        return torch.stack(torch._foreach_norm(r)).square().sum()

    count = sum(t.numel() for t in lists[0])
    against = {OURS: partial(ops.cg_update_, *lists, alpha), EAGER: foreach}
    yield streaming(f"cg_update_, {count} elements", 6, torch.empty(count, device=device), against)


def sparse_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Against dense products of a weight that was masked before, cuSPARSE and the sparse tensor cores."""
    size, count = (64, 1000) if small else (2048, 11_200_000)
    scores = torch.randn(count, device=device)
    kept = count // 10

    def torch_topk() -> Tensor:
        mask = torch.zeros(count, dtype=torch.bool, device=device)
        return mask.index_fill_(0, scores.topk(kept, sorted=False).indices, True)

    against = {OURS: lambda: ops.topk_mask(scores, 0.1), EAGER: torch_topk}
    yield Case(f"topk_mask, {count} scores", against, OURS)
    for dtype, density in ((torch.float32, 0.1), (torch.float32, 0.02), (torch.bfloat16, 0.1)):
        weight = torch.randn(size, size, device=device, dtype=dtype)
        mask = ops.topk_mask(torch.rand(size, size, device=device), density)
        dense, sparse, packed = weight * mask, ops.SparseMask(mask), ops.pack_weight(weight, mask)
        for samples in (1, 16, 128, 2048):
            x = torch.randn(samples, size, device=device, dtype=dtype)
            forms: Rivals = {
                OURS: partial(ops.masked_linear, x, weight, sparse),
                "blokern, packed": partial(ops.packed_linear, x, packed),
                EAGER: partial(torch.nn.functional.linear, x, dense),
            }
            if dtype == torch.float32:
                forms["CSR (cuSPARSE)"] = partial(torch.mm, dense.to_sparse_csr(), x.t().contiguous())
            yield Case(
                f"masked_linear, {size}², {density:.0%}, {samples} samples, {str(dtype)[6:]}", forms, OURS
            )
    if device.type == "cuda":
        weight = torch.randn(2 * size, 2 * size, device=device, dtype=torch.bfloat16)
        masked = weight * ops.nm_mask(weight, 2, 4)
        tensor_cores = torch.sparse.to_sparse_semi_structured(masked)
        for samples in (16, 2048):
            x = torch.randn(samples, 2 * size, device=device, dtype=torch.bfloat16)
            forms = {
                name: partial(torch.nn.functional.linear, x, w)
                for name, w in ((OURS, tensor_cores), (EAGER, masked))
            }
            yield Case(f"2:4 by tensor cores, {2 * size}², {samples} samples", forms, OURS)


def loop_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Ten steps of PGD: one launch by a graph, under autocast with channels_last too."""
    build, batch, steps = (models.small_cnn, 2, 2) if small else (models.resnet18, 128, 10)
    model = build().to(device).eval()
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    plain = PGD(model, steps=steps)
    found = rivals((x, y), plain)
    if device.type == "cuda":
        found["blokern, cuda_graph"] = partial(PGD(model, steps=steps, cuda_graph=True), x, y)
    last = build().to(device, memory_format=torch.channels_last).eval()
    mixed = PGD(last, steps=steps)

    def under_autocast() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return mixed(x.to(memory_format=torch.channels_last), y)

    found["blokern, bfloat16 and channels_last"] = under_autocast
    yield Case(f"PGD-{steps} on {build.__name__}, batch {batch}", found, OURS)


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    yield from attack_cases(device, small)
    yield from curvature_cases(device, small)
    yield from list_cases(device, small)
    yield from sparse_cases(device, small)
    yield from loop_cases(device, small)


def race(device: torch.device, rounds: int, seconds: float, small: bool = False) -> list[Row]:
    """The rows of the cases that could begin within so many seconds; says which could not."""
    clock = device_time if device.type == "cuda" else wall_time
    until, rows = time.monotonic() + seconds, []
    for case in cases(device, small):
        if time.monotonic() > until:
            print(f"no time left for: {case.name}")
            continue
        found = run_case(case, rounds, clock)
        print(case.name, *(f"{row.rival} {pretty(row.seconds)}" for row in found), sep="; ", flush=True)
        rows += found
    return rows


def shares(rows: Sequence[Row]) -> str:
    """One line a kernel: its share of the copy's rate, and how many times as long its rivals took."""
    lines = ["| kernel | time | of a copy | eager | compiled |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(row.case for row in rows):
        found = {row.rival: row for row in rows if row.case == name}
        if COPY not in found:
            continue
        times = [f"{found[r].times_ours:.1f}×" if r in found else "" for r in (EAGER, COMPILED)]
        share = f"{100 * found[COPY].times_ours:.0f} %"
        lines.append(f"| {name} | {found[OURS].seconds * 1e6:.1f} µs | {share} | {times[0]} | {times[1]} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="sizes for a test of this program")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=120.0, help="no case begins later")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    rows = race(args.device, args.rounds, args.seconds, args.small)
    card = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "none"
    args.out.write_text(json.dumps({"suite": "cuda", "card": card, **report(rows)}, indent=1) + "\n")
    print(shares(rows))


if __name__ == "__main__":
    main()
