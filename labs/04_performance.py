# %% [markdown]
# # 04 Performance
#
# After this lesson you know
# - whether attention is bound by memory or by arithmetic, on this machine and on others;
# - why tiles are 64 to 128 high: too small re-reads, too large does not fit;
# - what shared-memory bank conflicts are, and how padding and swizzling end them;
# - how long memory takes to answer, measured by a pointer chase;
# - what each rung from six kernels to the best one brings, and how time scales;
# - how well time can be predicted from sizes, and when not to bother at all.

# %%
import statistics
from dataclasses import replace

import torch

from tilewise.bench.calibrate import calibrate, call_of
from tilewise.bench.inputs import attention_inputs, default_text
from tilewise.bench.lab import expect, measured, pick, show
from tilewise.bench.ladder import climb
from tilewise.bench.latency import chase
from tilewise.bench.profile import profile_call
from tilewise.bench.report import units
from tilewise.bench.report.charts import Series, log_chart
from tilewise.bench.report.pictures import bank_picture, bars
from tilewise.bench.report.roofline import Point, roofline_chart
from tilewise.bench.timer import interleaved
from tilewise.cost import DEVICES, TileShape, flash_v2_counts, forward_flops, place, self_attention
from tilewise.cost.advice import advise, attention_share
from tilewise.cost.banks import SharedTile, conflict_ways
from tilewise.cost.roofline import dot_specs, dot_step, standard_steps
from tilewise.reference import flash_v2

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = pick(torch.float32, torch.bfloat16)
kind = str(dtype).removeprefix("torch.")

# %% [markdown]
# ## Calibration
#
# A short run: what a large matrix product and a large copy reach here, and how long each backend takes on random
# shapes. Two thirds of the shapes fit the predictor, the others judge it.

# %%
calibration = calibrate(
    device,
    dtype,
    seconds=pick(0.0, 40.0),
    training=pick(14, 36),
    held_out=pick(7, 30),
    largest=pick(2**17, None),
)
here = calibration.device
print(
    f"{here.name}: {here.peak(kind) / 1e12:.3f} TFLOP/s, {here.bandwidth / 1e9:.1f} GB/s, "
    f"balance {here.balance(kind):.1f} FLOP/byte"
)
for fit in calibration.fits:
    print(
        f"{fit.backend:9} {fit.direction:9} median error {fit.median_error:6.1%}, worst {fit.worst_error:6.1%}, "
        f"repeats differ by {fit.spread:.1%}"
    )
assert here.peak(kind) > 0
assert all(fit.held_out for fit in calibration.fits)

# %% [markdown]
# ## The roofline
#
# A kernel of intensity I (FLOPs a byte moved) attains at most `min(peak, I·bandwidth)`. The steps of standard attention
# stand on the slope, fused attention on the flat roof, decoding far down the slope: it reads the cache and does little
# with it.

# %%
specs = dot_specs(here.arch, kind)
points = []
for style, dot in enumerate(calibration.dots):
    placed = place(dot_step(dot.name, specs[dot.name]), here, kind)
    rate = dot.flops / dot.seconds
    points.append(Point(dot.name, placed.step.intensity, placed.attainable, rate, style))
    print(
        f"{dot.name:9} {placed.step.intensity:8.2f} FLOP/byte, {placed.bound}-bound, reaches "
        f"{placed.reached(dot.seconds):.0%} of {placed.attainable / 1e9:.1f} GFLOP/s"
    )
softmax = place(standard_steps(specs["standard"])[1], here, kind)
points.append(Point("softmax step", softmax.step.intensity, softmax.attainable, None, 4))
show(
    roofline_chart(f"Roofline of {here.name}", here.peak(kind), here.bandwidth, points),
    "Hollow: allowed; filled: measured",
)
assert place(dot_step("decode", specs["decode"]), here, kind).bound == "memory"
assert softmax.bound == "memory"
h100 = DEVICES["H100 SXM"]
long = self_attention(8192, 128)
assert place(dot_step("standard", long), h100, "float16").bound == "memory"
assert place(dot_step("flash", long), h100, "float16").bound == "compute"

# %% [markdown]
# ## One call under the profiler
#
# Which operators ran, and how near each came to the roof. `tilewise profile` does this for any shape.

# %%
spec = self_attention(pick(256, 8192), 64, heads=4, dtype=kind)
for backend in ("standard", "auto"):
    found = profile_call(call_of(spec, backend, "forward", device, dtype), spec, device, here)
    print(backend)
    for kernel in found.kernels[:4]:
        reached = "" if kernel.reached is None else f", {kernel.reached:.0%} of the roof"
        print(f"  {kernel.name:52} {kernel.calls:3}× {kernel.milliseconds:8.3f} ms{reached}")
    assert found.kernels

# %% [markdown]
# ## Block sizes
#
# A taller Q tile reads K and V less often: the intensity of a tile is its height. A larger tile needs more registers
# and shared memory, until one multiprocessor holds a single program, or none. The bytes below are what the reference
# loop counts and, beside them, what the model says: they are equal.

# %%
n, d = pick(128, 1024), 32
q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
moved, a100 = {}, DEVICES["A100 80GB"]
for block in (8, 16, 32, 64, 128):
    counted = flash_v2(q, k, v, block_m=block, block_n=block)[1].bytes
    predicted = flash_v2_counts(self_attention(n, d, dtype="float32"), block, block).traffic.bytes
    assert counted == predicted
    shape = TileShape(block, block, 128, 128)
    moved[f"{block}×{block}"] = counted
    print(
        f"{block:3}×{block:<3}: {units.size(counted):>8} moved; at D = 128 in fp16 {units.size(shape.shared(2)):>8} "
        "shared, "
        f"{shape.programs_per_sm(a100, 2)} programs a multiprocessor of an A100"
    )
show(bars("Bytes moved by tile size", moved, units.size), f"Bytes through memory by tile size, N = {n}")
assert list(moved.values()) == sorted(moved.values(), reverse=True)
assert TileShape(256, 256, 128, 128).programs_per_sm(a100, 2) == 0

# %% [markdown]
# ## Bank conflicts
#
# Shared memory is 32 banks; a warp's lanes that want different words of one bank wait for each other. Rows of 128 bytes
# put a column into one bank. Padding shifts each row by 16 bytes, and costs memory; swizzling permutes 16-byte chunks,
# and costs nothing.

# %%
for layout in ("plain", "padded", "swizzled"):
    tile = SharedTile(64, 64, "float16", layout)
    ways = {access: conflict_ways(tile, access) for access in ("row", "column", "matrix")}
    print(f"{layout:9} {tile.nbytes:5} B: " + ", ".join(f"{access} {way:g}×" for access, way in ways.items()))
    show(bank_picture(tile, "matrix"), f"{layout}: eight rows of 16 bytes, four times (ldmatrix)")
assert conflict_ways(SharedTile(64, 64, "float16", "plain"), "matrix") == 8
assert conflict_ways(SharedTile(64, 64, "float16", "swizzled"), "matrix") == 1
assert SharedTile(64, 64, "float16", "swizzled").nbytes == SharedTile(64, 64).nbytes

# %% [markdown]
# ## How long memory takes to answer
#
# Each load's address is the result of the one before, so nothing overlaps. As the working set outgrows one level after
# another, a step takes longer. (On a CPU the interpreter's own time, that of the smallest set, is subtracted.)

# %%
sets = [2**e for e in pick((13, 15, 18, 21, 24, 26), (14, 16, 18, 20, 22, 24, 26, 28, 30))]
latencies = chase(sets, device, steps=pick(60_000, 100_000))
for found in latencies:
    print(f"{units.size(found.size):>8}: {found.nanoseconds:6.1f} ns")
points = tuple((float(x.size), x.nanoseconds) for x in latencies if x.nanoseconds > 0)
show(
    log_chart(
        "Latency by working set",
        [Series("a dependent load", points, 5, strong=True)],
        x_label="working set, bytes",
        x_text=units.size,
        y_text=lambda ns: f"{units.significant(ns)} ns",
    ),
    "A dependent load, by working set",
)
expect(latencies[-1].nanoseconds > latencies[1].nanoseconds, "memory answers later than a cache")

# %% [markdown]
# ## The kernel ladder
#
# The same attention, rung by rung. On a CPU the loops are Python and the fused kernel is ATen's; on a GPU the rungs are
# kernels.

# %%
times: dict[str, float] = {}
for n in pick((128, 512), (128, 512, 2048, 4096)):
    inputs = attention_inputs(
        default_text(), length=n, heads=pick(2, 16), head_dim=pick(64, 128), dtype=dtype, device=device
    )
    ladder = climb(inputs, seconds=pick(0.1, 1.0))
    times = {step.name: step.milliseconds for step in ladder if step.milliseconds}
    print(f"N = {n}")
    for step in ladder:
        took = "–" if step.milliseconds is None else units.duration(step.milliseconds)
        over = "" if step.milliseconds is None else f"{times['six steps'] / step.milliseconds:6.1f}×"
        print(f"  {step.name:11} {took:>9} {over:>8}  {step.adds}" + (f" ({step.why[:70]})" if step.why else ""))
show(bars("The ladder", times, units.duration), f"Time of each rung, N = {n}")
best = min(times, key=times.get)
expect(times[best] < times["six steps"], "one fused kernel beats six")

# %% [markdown]
# ## Scaling
#
# Twice the length is four times the work, twice the batch or the heads twice the work: counted exactly, and measured.

# %%
base = self_attention(pick(256, 2048), 64, batch=2, heads=pick(2, 16), dtype=kind)
grown = {
    "as it is": base,
    "N × 2": replace(base, q_len=2 * base.q_len, k_len=2 * base.k_len),
    "batch × 2": replace(base, batch=2 * base.batch),
    "heads × 2": replace(base, heads=2 * base.heads, kv_heads=2 * base.kv_heads),
}
calls = {name: call_of(spec, "standard", "forward", device, dtype) for name, spec in grown.items()}
for call in calls.values():
    call()
scaled = interleaved(calls, device, seconds=pick(0.1, 0.5))
for name, spec in grown.items():
    work = forward_flops(spec).total / forward_flops(base).total
    print(f"{name:10} {work:.0f}× the work, {scaled[name].least / scaled['as it is'].least:.1f}× the time of standard")
    assert work == {"as it is": 1, "N × 2": 4}.get(name, 2)
expect(scaled["N × 2"].least > 2 * scaled["as it is"].least, "time of standard attention grows faster than N")

# %% [markdown]
# ## When not to bother
#
# Attention's share of a model's FLOPs is about `N / (N + 5·d)` without causality: at a length of 512 and a width of
# 1024 it is 9 %, and no mechanism can make a step shorter than that.

# %%
for n in (512, 2048, 8192, 32768):
    share = attention_share(self_attention(n, 64, heads=16), layers=24)
    print(f"N = {n:6}: attention is {share:.0%} of the products of a 24-layer model of width 1024")
short = advise(self_attention(512, 64, heads=16, dtype="float16"), h100, "train")
print(short.reasons[-1])
assert not short.bother
assert advise(self_attention(8192, 64, heads=16, dtype="float16"), h100, "train").bother

# %%
dots = {dot.name: dot.flops / dot.seconds for dot in calibration.dots}
measured(
    balance=f"{here.balance(kind):.1f} FLOP/byte",
    flash_reaches=f"{dots['flash'] / here.peak(kind):.0%} of the largest matrix product",
    latency_of_the_largest_set=f"{latencies[-1].nanoseconds:.0f} ns",
    best_rung=f"{best}, {times['six steps'] / times[best]:.1f}× six steps",
    predictor=f"median error {statistics.median(fit.median_error for fit in calibration.fits):.0%} on held-out shapes",
)

# %% [markdown]
# ## Checklist
# - I can place a kernel under the roof of a device from its FLOPs and bytes.
# - I can say what bounds a tile from below and from above.
# - I can see a bank conflict in a layout.
# - I know when attention is not worth optimising.
#
# ## Questions
# 1. *Why is decoding memory-bound on every device?* Each key is used once for each query head of its group: a few FLOPs
#    a byte, against balances of 15 (this kind of CPU) to 400.
# 2. *Why does a larger block_n not raise the intensity of a tile?* K and V are read once for each Q tile whatever
#    block_n is; only block_m says how many queries share a read.
# 3. *What does the naive "76× faster" compare?* On-chip bytes with off-chip bytes. By traffic alone 1 + N/D is the
#    most.
# 4. *Why does the predictor add times instead of taking the largest?* Overlap is never complete; the sum fits better,
#    and its error on shapes that it never saw is stated beside every prediction.
