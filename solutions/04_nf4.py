# ---
# title: Quantization and NF4
# minutes: 90
# needs: [00_start, 02_lora]
# ---
# %% [markdown]
# A weight in 16 bits has 65,536 values to choose from. How many does it need? This chapter goes down to **sixteen**:
# four bits a weight, matrices in little more than a quarter of their size, and a model that still works. You build the
# data type that QLoRA uses, **NF4**, from nothing but the normal distribution, and end with the very bytes that
# `bitsandbytes` writes.
#
# **After this chapter you can**
#
# - quantize weights by their largest magnitude (*absmax*), in blocks, and say what a single outlier does to its block;
# - derive NF4's sixteen levels, and say what they are optimal for and what they are not;
# - pack codes into bytes, take them out again, and recognise your bytes in a checkpoint;
# - count the bits that a weight *really* takes: 4.5, and 4.127 with double quantization;
# - compare NF4, FP4, INT4 and Lloyd–Max, in error and in what it does to a model.

# %%
import ast
import inspect
import logging
import math
import statistics
import warnings

import torch
from IPython.display import Markdown, display
from torch import nn

from pefttools.codebook import NF4_CODE, dynamic_codebook, fp4_codebook, int4_codebook, lloyd_max, nf4_codebook
from pefttools.grading import check
from pefttools.lab import code_of, encoded, generate, held_out_loss, load_base, load_data, prompt_of, steps, train
from pefttools.nf4 import quantize_nf4
from pefttools.widgets import nf4 as pictures
from pefttools.widgets.base import show

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)   # it complains about extras that we do not need
warnings.filterwarnings("ignore")

model, tokenizer = load_base("tiny")
linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}
weights = {name: layer.weight.detach().clone() for name, layer in linears.items()}
all_weights = torch.cat([w.flatten() for w in weights.values()])
print(f"{len(weights)} linear layers with {len(all_weights):,} weights, of {sum(p.numel() for p in model.parameters()):,}")

# %% [markdown]
# (The rest is the embedding, which is also the output head, and the norms. They stay in 16 bits, as they do in QLoRA.)
#
# ## The picture
#
# Here are 64 weights that stand next to one another in the bundled model. They are divided by the largest magnitude
# among them, so that they lie between −1 and 1. Then each falls to the nearest of sixteen levels. What is stored of a
# weight is only *the number of its level*, 0 to 15, and that fits into four bits.

# %%
block = weights["model.layers.2.self_attn.q_proj"].flatten()[:64]
absmax_of_block = block.abs().max().item()
show(pictures.rounding_picture(block.tolist(), NF4_CODE.tolist()),
     alt=f"64 ticks on a line from −1 to 1, the weights of a block divided by {absmax_of_block:.3f}. From each a line goes "
         "down to the nearest of 16 circles, the levels, numbered 0 to 15. The circles are close together around 0 and far "
         "apart at the ends; most weights fall to the middle ones.")

# %% [markdown]
# *The levels are close together where most weights are. Only one number per block is stored in full: the one that
# everything was divided by.*
#
# In a formula, for a block of weights $w_1, \dots, w_n$ and levels $\ell_0 < \ell_1 < \dots < \ell_{15}$:
#
# $$a = \max_i |w_i|, \qquad c_i = \arg\min_k \left| \frac{w_i}{a} - \ell_k \right|, \qquad \hat w_i = a \cdot \ell_{c_i} .$$
#
# | symbol | what it is | size | stored |
# |---|---|---|---|
# | $w_i$ | a weight | $n$ of them in a block, usually 64 | no longer |
# | $a$ | the block's **absmax**, its largest magnitude | one a block | yes, float32 |
# | $\ell_k$ | the **levels**; all together the **codebook** | 16, the same for all blocks | once |
# | $c_i$ | the **code** of a weight: the number of its level | 0 … 15 | yes, 4 bits |
# | $\hat w_i$ | what comes back: the weight **dequantized** | as $w$ | made when needed |
#
# *Quantize* means to go from $w$ to $(c, a)$, *dequantize* to go back to $\hat w$. Three questions are left, and they
# are this chapter: how large a block, which levels, and how to store it all.

# %% [markdown] exercise="nearest-level"
# One step first: $\arg\min$. Write `nearest_level(values, levels)`.
#
# | argument | shape |
# |---|---|
# | `values` | `[n]`, any numbers |
# | `levels` | `[k]`, ascending |
# | *returns* | `[n]` whole numbers: for each value the number of the level nearest to it |
#
# Values beyond the outermost levels go to those. (No value in the check lies exactly halfway between two levels.)
#
# *Why it matters:* every quantizer in this chapter ends in this line.

# %% exercise="nearest-level"
def nearest_level(values, levels):
    """values [n], levels [k] ascending → whole numbers [n], the nearest level's number for each."""
    ### BEGIN SOLUTION
    distance = (values[:, None] - levels[None, :]).abs()      # [n, k]
    return distance.argmin(dim=1)
    ### END SOLUTION

# %% check="nearest-level"
check("nearest-level", nearest_level)

# %% [markdown] hint="nearest-level" level="nudge"
# How far is each value from each level? That is a table of `n` rows and `k` columns. Then look for the smallest entry
# in each row.

# %% [markdown] hint="nearest-level" level="shape"
# `values[:, None] - levels` has shape `[n, k]`. `.argmin(dim=...)` gives the place of the smallest entry; along which
# of the two dimensions?

# %% [markdown] hint="nearest-level" level="code"
# `return (values[:, None] - levels).abs().argmin(dim=...)`

# %% [markdown]
# ## By hand: six weights, as a slide has them
#
# Slide 000 quantizes six weights with a codebook of its own, to show how NF4 works:
#
# $$w = (0.05,\ -0.3,\ 0.95,\ 0.0,\ -0.02,\ 0.5)$$
#
# | code | 0000 | 0001 | 0010 | 0011 | 0100 | 0101 | 0110 | 0111 |
# |---|---|---|---|---|---|---|---|---|
# | value | −1.51 | −1.14 | −0.91 | −0.76 | −0.59 | −0.44 | −0.30 | −0.18 |
# | **code** | **1000** | **1001** | **1010** | **1011** | **1100** | **1101** | **1110** | **1111** |
# | value | −0.06 | 0.06 | 0.18 | 0.30 | 0.44 | 0.59 | 0.76 | 1.00 |
#
# 1. Mean 0.1967, standard deviation 0.411 (the root of the mean square: divided by 6, not by 5).
# 2. Subtract the one, divide by the other: $(-0.357, -1.209, 1.833, -0.478, -0.527, 0.736)$.
# 3. The nearest entries of the table: $(-0.44, -1.14, 1.0, -0.44, -0.44, 0.76)$.
# 4. Their codes: 0101, 0001, 1111, 0101, 0101, 1110.
#
# **There are errors in it**: a number of step 2 is off in its third digit, and two of step 3 are not the nearest ones. Check
# with pencil and paper before you go on: for step 2 the last weight will do, for step 3 the first and the fifth. Then let the
# computer do all six.

# %%
def library_nearest(values, levels):
    """As yours; the demonstrations below use this one, so that they run whatever is written above."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2)


slide = torch.tensor([-1.51, -1.14, -0.91, -0.76, -0.59, -0.44, -0.30, -0.18, -0.06, 0.06, 0.18, 0.30, 0.44, 0.59, 0.76, 1.00])
six = torch.tensor([0.05, -0.3, 0.95, 0.0, -0.02, 0.5])
mean, std = six.mean(), six.std(correction=0)
z = (six - mean) / std
printed_z = torch.tensor([-0.357, -1.209, 1.833, -0.478, -0.527, 0.736])
printed_codes = [0b0101, 0b0001, 0b1111, 0b0101, 0b0101, 0b1110]
slide_codes = library_nearest(printed_z, slide).tolist()

print(f"mean {mean:.4f}, standard deviation {std:.3f}")
print(f"{'weight':>8}{'printed z':>11}{'z':>9}{'printed code':>15}{'nearest':>10}")
for w, p, v, said, right in zip(six.tolist(), printed_z.tolist(), z.tolist(), printed_codes, slide_codes):
    print(f"{w:8.2f}{p:11.3f}{v:9.3f}   {said:04b} {slide[said]:6.2f}   {right:04b} {slide[right]:5.2f}"
          + ("   ← not the nearest" if said != right else ""))
wrong_codes = sum(a != b for a, b in zip(printed_codes, slide_codes))
code_of_047 = library_nearest(torch.tensor([0.47]), slide).item()
print(f"\n{wrong_codes} of 6 codes are wrong. And a weight of 0.47, which the slide sends to 0110 ({slide[0b0110]:.2f}), "
      f"goes to {code_of_047:04b} ({slide[code_of_047]:.2f}).")

# %% [markdown]
# (The sixth $z$ is a slip as well: 0.738, not 0.736. It changes no code.)
#
# Wrong rounding is a slip of the pen. The larger error is the *method*: NF4 subtracts no mean and divides by no
# standard deviation. It divides by the absmax. Do it right, by hand, with NF4's levels around the values we need: …
# −0.395, −0.284, … −0.091, 0, 0.080, … 0.441, 0.563, … 1.
#
# 1. $a = 0.95$.
# 2. Divide: $(0.053,\ -0.316,\ 1,\ 0,\ -0.021,\ 0.526)$.
# 3. Nearest levels: $(0.080,\ -0.284,\ 1,\ 0,\ 0,\ 0.563)$, which are the codes $(8, 4, 15, 7, 7, 13)$.
# 4. And back, times $a$: $(0.076,\ -0.270,\ 0.95,\ 0,\ 0,\ 0.534)$.
#
# What would have come back the slide's way, with its mean and deviation put in again? Both, side by side:

# %%
a_six = six.abs().max()
right_codes = library_nearest(six / a_six, NF4_CODE)
right_back = a_six * NF4_CODE[right_codes]
slide_back = slide[printed_codes] * std + mean
print(f"{'weight':>8}{'as printed':>14}{'NF4':>10}     code")
for w, a, b, c in zip(six.tolist(), slide_back.tolist(), right_back.tolist(), right_codes.tolist()):
    print(f"{w:8.2f}{a:14.3f}{b:10.3f}     {c:2} = {c:04b}")
error_of = {"as printed": ((slide_back - six).norm() / six.norm()).item(), "NF4": ((right_back - six).norm() / six.norm()).item()}
print("relative error:", ", ".join(f"{name} {error:.3f}" for name, error in error_of.items()))

# %% [markdown]
# Two things got lost the slide's way. The largest weight, 0.95, came back as 0.61, because the codebook ends at 1.00
# and the normalised value was 1.83: it was *clipped*. After division by absmax nothing can be clipped. And the weight 0
# came back as 0.016. NF4 gives 0 back as exactly 0.
#
# By the **relative error** we mean here and from now on $\sqrt{\sum (w-\hat w)^2 / \sum w^2}$: how large the error is
# compared with the weights.

# %% [markdown]
# ## Eight bits first: absmax and blocks
#
# With 8 bits there is no need to choose levels with care: 255 evenly spaced ones are fine enough. That is **absmax
# int8** (chapter 03 loads a model in 8 bits; there each row is a block):
#
# $$q_i = \mathrm{round}\!\left(127 \cdot \frac{w_i}{a}\right), \qquad \hat w_i = q_i \cdot \frac{a}{127} .$$
#
# By hand, for the block $(0.3, -1.2, 0.05, 0.61)$: $a = 1.2$, the factor is $127/1.2 = 105.83$, and
# $q = (32, -127, 5, 65)$. Back: $32 \cdot 1.2/127 = 0.302$, and so on. No weight can be off by more than half a step,
# $a/254 = 0.0047$.

# %% [markdown] exercise="absmax-int8"
# Write `absmax_int8(w, block_size)`.
#
# | argument | shape |
# |---|---|
# | `w` | `[n]` float32; `n` is a multiple of `block_size` |
# | *returns* | `(q, absmax)`: `[n]` int8, and `[n / block_size]` float32 |
#
# The first `block_size` weights are the first block, and so on. A block of zeros gives zeros.
#
# *Why it matters:* the simplest quantizer there is, and good enough to run large models with.

# %% exercise="absmax-int8"
def absmax_int8(w, block_size):
    """w [n] float32 → (q [n] int8, absmax [n / block_size]), one absmax a block."""
    ### BEGIN SOLUTION
    blocks = w.view(-1, block_size)                           # [blocks, block_size]
    absmax = blocks.abs().amax(dim=1)                         # [blocks]
    scale = 127 / absmax.clamp(min=1e-30)                     # a block of zeros: 0 times anything finite is 0
    q = torch.round(blocks * scale[:, None]).to(torch.int8)
    return q.view(-1), absmax
    ### END SOLUTION

# %% check="absmax-int8"
check("absmax-int8", absmax_int8)

# %% [markdown] hint="absmax-int8" level="nudge"
# Give `w` the shape `[blocks, block_size]`, and everything that belongs to a block stands in a row. Round before you
# make whole numbers of it: `.to(torch.int8)` alone cuts off.

# %% [markdown] hint="absmax-int8" level="shape"
# `w.view(-1, block_size).abs().amax(dim=1)` is `[blocks]`; with `[:, None]` it stretches over a block's weights. For a
# block of zeros, `clamp(min=1e-30)` keeps you from dividing by 0.

# %% [markdown] hint="absmax-int8" level="code"
# ```python
# blocks = w.view(-1, block_size)
# absmax = blocks.abs().amax(dim=1)
# q = torch.round(blocks * (127 / absmax.clamp(min=1e-30))[:, None]).to(...)
# return q.view(-1), absmax
# ```

# %% [markdown]
# ### Predict
#
# Take 4,096 normal numbers and make **one** of them 50 times as large as a usual one. Quantize them once as a single
# block, once in blocks of 64, in 8 bits and in 4. What happens to the error of *the other 4,095*? Say, for each of
# the four: about as before, some times larger, hopeless.

# %%
def round_trip(w, levels, block_size=64, shift=0):
    """Quantize and dequantize w of any shape, with any ascending levels from -1 to 1. The blocks begin at weight `shift`."""
    blocks = w.flatten().roll(-shift).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    back = levels[library_nearest(blocks / absmax, levels)] * absmax
    return back.flatten().roll(shift).view(w.shape)


def relative_error(w, back):
    return ((back - w).norm() / w.norm()).item()


int8_levels = torch.arange(-127, 128) / 127                   # absmax int8 is the codebook with 255 even levels
rng = torch.Generator().manual_seed(0)
clean = torch.randn(4096, generator=rng)
spoilt = clean.clone()
spoilt[1000] = 50.0
others = torch.arange(4096) != 1000
outlier_table = {}
for bits, levels in {"8 bits": int8_levels, "4 bits (NF4)": NF4_CODE}.items():
    for size in (4096, 64):
        outlier_table[bits, size] = [relative_error(w[others], round_trip(w, levels, size)[others]) for w in (clean, spoilt)]
        before, after = outlier_table[bits, size]
        print(f"{bits:13} blocks of {size:5}: relative error of the others {before:.4f} → {after:.4f}, {after / before:5.1f} ×")
lost = (round_trip(spoilt, NF4_CODE, 4096)[others] == 0).float().mean().item()
print(f"\nNF4 in one block: {lost:.0%} of the others have become 0")

# %% [markdown]
# The absmax is decided by the largest weight alone, and everybody in its block pays. Blocks do not make that go away;
# they keep the damage among 64 neighbours. A price has to be paid for it: one absmax per block. We count it below.
#
# Large models do have such outliers, above all in their *activations*. LLM.int8() (Dettmers et al. 2022) takes out the
# columns that hold them and keeps those in 16 bits.

# %% question="nf4-q-outlier"

# %% [markdown]
# ## Four bits: which sixteen levels?
#
# Weights of a trained network are, roughly, normally distributed around 0. Evenly spaced levels would spend much of
# the sixteen where hardly any weight is. So QLoRA asks for levels that stand at **quantiles** of the normal
# distribution: between neighbours there should be about equally many weights.
#
# The **quantile** $\Phi^{-1}(p)$ is the number below which a standard normal variable falls with probability $p$. (So
# $\Phi^{-1}(0.5) = 0$, and $\Phi^{-1}(0.975) = 1.96$.) Take the probabilities in even steps, and their quantiles come
# out close together in the middle and far apart at the ends:

# %%
show(pictures.codebook_figure(),
     alt="The S-shaped distribution function of the normal distribution. From evenly spaced probabilities on the vertical axis, "
         "lines go to the curve and down to the horizontal axis: seven squares below zero, zero, and eight circles above, close "
         "together near zero and far apart outside. A scale on top shows them divided by 1.848, from −1 to 1.")

# %% [markdown]
# *Even steps upwards become uneven steps sideways. Below zero there are seven steps, above eight.*
#
# Why so odd? Sixteen quantiles in one row would have no level at 0, and a weight that is exactly 0 (padding, pruned
# weights) should stay 0. A symmetric set with 0 in it has an odd number of levels: 15 would waste one code. So NF4 makes
# the two sides apart and gives the extra level to the upper one:
#
# - above zero: $\Phi^{-1}$ of **9** probabilities, evenly spaced from $0.9677083$ down to $0.5$;
# - below zero: $-\Phi^{-1}$ of **8** probabilities, evenly spaced from $0.9677083$ down to $0.5$;
# - both end in $\Phi^{-1}(0.5) = 0$: take 0 only once. That makes $8 + 7 + 1 = 16$.
# - Divide all by the largest.
#
# The outermost probability cannot be 1, whose quantile is infinite. The authors take the mean of $1 - \frac{1}{32}$ and
# $1 - \frac{1}{30}$, where half a step of 1/16 and of 1/15 would end: $0.9677083$.
#
# By hand, one level: the second of the nine is $0.9677083 - 0.4677083/8 = 0.9092448$. Its quantile is $1.33612$, the
# largest is $1.84813$, and $1.33612 / 1.84813 = 0.72296$. That is number 14.

# %% [markdown] exercise="nf4-codebook"
# Write `nf4_levels(offset)`: the 16 levels, ascending, as a float32 tensor `[16]`. `offset` is the outermost
# probability.
#
# The quantile function is `torch.special.ndtri(p)` for a tensor, or `statistics.NormalDist().inv_cdf(p)` for a number.
# Compute in float64 (`dtype=torch.float64`) and convert at the end.
#
# *Why it matters:* after this you know all there is to know about where NF4 comes from. There is no data in it.

# %% exercise="nf4-codebook"
def nf4_levels(offset=0.9677083):
    """The 16 levels of NF4, float32 [16], ascending from -1 to 1."""
    ### BEGIN SOLUTION
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])      # 8 levels
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])     # 7 levels
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()
    ### END SOLUTION

# %% check="nf4-codebook"
check("nf4-codebook", nf4_levels)

# %% [markdown] hint="nf4-codebook" level="nudge"
# Three pieces, put together with `torch.cat` and sorted: eight quantiles, a zero, seven quantiles with a minus sign.
# Only then divide.

# %% [markdown] hint="nf4-codebook" level="shape"
# `torch.linspace(offset, 0.5, 9)` has nine entries, of which the last is 0.5: `[:-1]` leaves the eight above zero. For
# the other side the same with 8.

# %% [markdown] hint="nf4-codebook" level="code"
# ```python
# above = torch.special.ndtri(torch.linspace(offset, 0.5, ..., dtype=torch.float64)[:-1])
# below = -torch.special.ndtri(...)
# levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
# return (levels / ...).float()
# ```

# %% [markdown]
# ### Against production: the sixteen numbers
#
# `bitsandbytes` has the table as sixteen typed-in constants. Are they what the formula gives?

# %%
import bitsandbytes
from bitsandbytes import functional as bnb

bnb_table = bnb.get_4bit_type("nf4", device="cpu")
p9, p8 = (torch.linspace(0.9677083, 0.5, k, dtype=torch.float64)[:-1] for k in (9, 8))
formula = torch.cat([-torch.special.ndtri(p8), torch.zeros(1, dtype=torch.float64), torch.special.ndtri(p9)]).sort().values
formula = formula / formula.max()
off_float64 = (formula - bnb_table.double()).abs().max().item()
off_float32 = (nf4_codebook() - bnb_table).abs().max().item()
negative, positive = int((bnb_table < 0).sum()), int((bnb_table > 0).sum())
for k in range(8):                                            # two columns: below zero and 0, above zero
    print("      ".join(f"{i:2}: {bnb_table[i]:+.7f} ({formula[i]:+.7f})" for i in (k, k + 8)))
print(f"\nbitsandbytes' constants (the formula's in brackets): largest difference {off_float64:.1e}")
print(f"with the probabilities rounded to float32 first, as torch.linspace does by default: {off_float32:g}")
print(f"{negative} below zero, {int((bnb_table == 0).sum())} at zero, {positive} above; from {bnb_table.min():g} to "
      f"{bnb_table.max():g}")
assert off_float64 < 2e-7 and off_float32 == 0

# %% [markdown]
# Equal, to about one unit of the seventh digit; and equal in *every bit* once one rounds where the authors' computer
# rounded. It cannot have been learned from any model's weights.

# %%
doc = inspect.getdoc(bnb.create_normal_map) or ""
for said, computed in (("8 negative and 9 positive", f"{negative} negative, {positive} positive, and zero"),
                       ("~1.845 standard deviations", f"{statistics.NormalDist().inv_cdf(0.9677083):.3f}")):
    print(f"bitsandbytes' own docstring says {said!r}: computed: {computed}" if said in doc else
          f"(this version of bitsandbytes no longer says {said!r}; computed: {computed})")
source = inspect.getsource(bnb.create_normal_map)
print("\n" + "\n".join(line.strip() for line in source.splitlines() if "norm.ppf(torch" in line or "/= values" in line))

# %% [markdown]
# Even the library's own description miscounts (8 and 9 would make seventeen). The code below it is right, and it is
# yours: `norm.ppf` is SciPy's name for the quantile function. (The first two lines are NF4; the last two belong to a
# symmetric type that is not used.)
#
# ### Is it true? Equal mass
#
# Source 001 says that NF4's sixteen bins have *equal probability mass*, and that this *minimises the error*. The first
# half can be counted. A bin is all that falls to one level. What share of the weights does each code get? Once for
# normal numbers that are put straight between the quantiles, as the construction imagines it; once for the same numbers
# as NF4 really meets them, in blocks of 64 divided by their absmax. **Guess:** will the second be as even as the first?

# %%
rng = torch.Generator().manual_seed(1)
normal = torch.randn(1 << 19, generator=rng)
largest_quantile = statistics.NormalDist().inv_cdf(0.9677083)
blocks = normal.view(-1, 64)
shares = {"between the quantiles themselves": library_nearest(normal / largest_quantile, NF4_CODE),
          "in blocks of 64, divided by absmax": library_nearest(blocks / blocks.abs().amax(1, keepdim=True), NF4_CODE)}
shares = {name: (torch.bincount(codes.flatten(), minlength=16) / codes.numel()).tolist() for name, codes in shares.items()}
show(pictures.shares_figure(shares), alt="Bars for the 16 codes. Between the quantiles all are near one sixteenth. In blocks: "
     + ", ".join(f"{100 * v:.1f}" for v in shares["in blocks of 64, divided by absmax"]) + " per cent.")
for name, values in shares.items():
    print(f"{name:36} from {min(values):.1%} to {max(values):.1%}")
code_bits = -sum(p * math.log2(p) for p in shares["in blocks of 64, divided by absmax"])
print(f"the codes in blocks carry {code_bits:.2f} bits each, of 4")
print(f"the absmax of 64 normal numbers is {blocks.abs().amax(1).mean():.2f} on average, the largest quantile {largest_quantile:.2f}")

# %% [markdown]
# *Nearly equal by construction; in real blocks the middle codes are used several times as often as the outer ones.* A
# block is divided by its own largest number, and that is well above the largest quantile: the values crowd towards 0.
# So "equal mass" is the idea of NF4, not a property of NF4 at work. (Bits: were all codes equally frequent, each would
# carry the full 4.) The second half of the claim, the error, comes further down.

# %% question="nf4-q-learned"

# %% [markdown]
# ## Quantize

# %% [markdown] exercise="nf4-quantize"
# Now the whole of it. Write `nf4_quantize(w, code, block_size)`.
#
# | argument | shape |
# |---|---|
# | `w` | `[d_out, d_in]` float32; `d_out · d_in` is a multiple of `block_size` |
# | `code` | `[16]`, the levels, ascending |
# | *returns* | `(codes, absmax)`: `[d_out · d_in]` whole numbers 0 … 15, and `[blocks]` float32 |
#
# Blocks run through the *flattened* weight, row after row, wherever a row ends. In a block of zeros, every code is
# that of level 0.
#
# *Why it matters:* this is what `load_in_4bit=True` does to each matrix of a model.

# %% exercise="nf4-quantize"
def nf4_quantize(w, code, block_size):
    """w [d_out, d_in], code [16] → (codes [d_out * d_in] of 0..15, absmax [blocks])."""
    ### BEGIN SOLUTION
    blocks = w.reshape(-1, block_size)                        # [blocks, block_size]
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)
    return codes.view(-1).to(torch.uint8), absmax
    ### END SOLUTION

# %% check="nf4-quantize"
check("nf4-quantize", nf4_quantize)

# %% [markdown] hint="nf4-quantize" level="nudge"
# You have both halves: blocks and absmax from `absmax_int8`, and `nearest_level`. What stands between them is one
# division.

# %% [markdown] hint="nf4-quantize" level="shape"
# `w.reshape(-1, block_size)` is `[blocks, block_size]`. Divided by `absmax[:, None]` it lies in −1 … 1.
# `nearest_level` wants one long row: flatten. Mind the block of zeros: `absmax.clamp(min=1e-38)`.

# %% [markdown] hint="nf4-quantize" level="code"
# ```python
# blocks = w.reshape(-1, block_size)
# absmax = blocks.abs().amax(dim=1)
# scaled = blocks / absmax.clamp(min=1e-38)[:, None]
# return nearest_level(scaled.flatten(), ...), absmax
# ```

# %% [markdown]
# (A table of distances `[n, 16]` is fine here; for a matrix of 16 million weights it would be a gigabyte. Then one
# counts how many of the 15 *middles* between levels lie below a value: `torch.bucketize(scaled, middles)`.)
#
# ## Bits into bytes
#
# The smallest thing a computer stores is a byte, eight bits. So two codes share one, and `bitsandbytes` puts the first
# of the two into the upper half. Here are four codes of the six weights above:

# %%
first_four = right_codes[:4].tolist()
show(pictures.bits_picture(first_four), alt="Codes " + ", ".join(map(str, first_four)) + " as four bits each, two by two in a "
     "byte, the first code in the upper half: " + " and ".join(f"{16 * a + b}" for a, b in zip(first_four[::2], first_four[1::2]))
     + ".")

# %% [markdown]
# *byte = 16 · first + second. Multiplying by 16 moves bits four places to the left.*

# %% [markdown] exercise="pack-nibbles"
# Write `pack_nibbles(codes)`: `codes` is `[n]` uint8, each 0 … 15. Return `[⌈n/2⌉]` uint8. If `n` is odd, fill up with
# a 0 at the end. (Half a byte is called a *nibble*.)
#
# *Why it matters:* until here nothing has been saved: a code in a uint8 takes 8 bits, and in an int64 it takes 64.

# %% exercise="pack-nibbles"
def pack_nibbles(codes):
    """codes uint8 [n] of 0..15 → bytes uint8 [ceil(n / 2)], the first code of each two in the upper half."""
    ### BEGIN SOLUTION
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[::2] << 4 | codes[1::2]
    ### END SOLUTION

# %% check="pack-nibbles"
check("pack-nibbles", pack_nibbles)

# %% [markdown] hint="pack-nibbles" level="nudge"
# `codes[::2]` are the first ones of each two, `codes[1::2]` the second ones. `<<` shifts bits to the left, `|` puts
# two bit patterns together.

# %% [markdown] hint="pack-nibbles" level="shape"
# Both halves must be equally long: for an odd `n`, append a zero first (`torch.cat` with `codes.new_zeros(1)`). A
# uint8 shifted by 4 stays a uint8.

# %% [markdown] hint="pack-nibbles" level="code"
# ```python
# if len(codes) % 2:
#     codes = torch.cat([codes, ...])
# return codes[::2] << ... | codes[1::2]
# ```

# %% question="nf4-q-byte"

# %% [markdown] exercise="nf4-dequantize"
# And back. Write `nf4_dequantize(packed, absmax, code, shape, block_size, dtype)`.
#
# | argument | what it is |
# |---|---|
# | `packed` | `[n/2]` uint8, two codes a byte |
# | `absmax` | `[n / block_size]` float32 |
# | `code` | `[16]` float32, the levels |
# | `shape`, `dtype` | what the result should have; `n` is the product of `shape` |
# | *returns* | the weights: level times absmax, multiplied in float32 and rounded to `dtype` once, at the end |
#
# *Why it matters:* a quantized model does this to every matrix in every forward pass.

# %% exercise="nf4-dequantize"
def nf4_dequantize(packed, absmax, code, shape, block_size, dtype):
    """packed uint8 [n/2], absmax [n / block_size], code [16] → weights of that shape and dtype."""
    ### BEGIN SOLUTION
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)        # [n]
    levels = code[codes.long()].view(-1, block_size)                       # [blocks, block_size]
    return (levels * absmax[:, None]).view(shape).to(dtype)
    ### END SOLUTION

# %% check="nf4-dequantize"
check("nf4-dequantize", nf4_dequantize)

# %% [markdown] hint="nf4-dequantize" level="nudge"
# Four steps: take the bytes apart, look up the levels, multiply by the right absmax, give it its shape.

# %% [markdown] hint="nf4-dequantize" level="shape"
# `packed >> 4` are the first codes and `packed & 15` the second ones, `[n/2]` each. `torch.stack([...], dim=1)` is
# `[n/2, 2]`, and flattened it has them in order. For indexing, codes must be int64: `.long()`.

# %% [markdown] hint="nf4-dequantize" level="code"
# ```python
# codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).long()
# levels = code[...].view(-1, block_size)
# return (levels * absmax[..., None]).view(shape).to(...)
# ```

# %% [markdown]
# ### Against production: every byte of the model
#
# All linear layers of the bundled model, through `bitsandbytes` on the CPU and through this course's library. Codes,
# absmaxes and dequantized weights have to be equal *in every bit*, or the cell stops. If your functions are written,
# they go through the same test.

# %%
def yours(make):
    """What your functions give; None while one is not written (or stumbles, and then the reason is shown)."""
    try:
        return make()
    except NotImplementedError:
        return None
    except Exception as error:
        print(f"yours stopped with {type(error).__name__}: {error}")
        return None


def my_bytes(w):
    codes, absmax = nf4_quantize(w, NF4_CODE, 64)
    packed = pack_nibbles(codes.to(torch.uint8))
    return packed, absmax, nf4_dequantize(packed, absmax, NF4_CODE, w.shape, 64, w.dtype)


def count_different(a, b):
    return int((a.flatten() != b.flatten()).sum())


unequal = {"bytes": 0, "absmax": 0, "dequantized weights": 0}
mine = dict(unequal)
byte_count = 0
for name, w in weights.items():
    their_bytes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    their_back = bnb.dequantize_4bit(their_bytes, state)
    ours = quantize_nf4(w)
    byte_count += their_bytes.numel()
    for counter, three in ((unequal, (ours.packed, ours.absmax, ours.dequantize())), (mine, yours(lambda: my_bytes(w)))):
        if three is None:
            mine = None
            break
        for key, x, y in zip(counter, three, (their_bytes, state.absmax, their_back)):
            counter[key] += count_different(x, y)
    if mine is None:
        mine = {}
print(f"{byte_count:,} bytes of {len(weights)} matrices; different from bitsandbytes {bitsandbytes.__version__}:")
for whose, counter in (("pefttools", unequal), ("yours", mine)):
    print(f"  {whose:10} " + (", ".join(f"{count:,} {what}" for what, count in counter.items()) or "(not written yet)"))
assert not any(unequal.values())

# %% [markdown]
# That takes more care than it seems, because a value may lie exactly halfway between two levels, or within a rounding
# error of it. The recipe: multiply by the *reciprocal* of absmax in float32; of two equally near levels take the lower;
# multiply and round once on the way back. Another order of operations may give another code now and then, for a weight
# where it hardly matters.
#
# ### Find the line
#
# In `bitsandbytes/backends/default/ops.py` the quantizer for processors without a kernel of their own is plain PyTorch.
# Every line of it is yours:

# %%
from bitsandbytes.backends.default import ops

lines = inspect.getsource(ops).splitlines()
begin = next(i for i, line in enumerate(lines) if 'register_kernel("bitsandbytes::quantize_4bit"' in line)
length = next(i for i, line in enumerate(lines[begin:]) if line.startswith("    return"))
shown_lines = lines[begin:begin + length + 1]
for i, line in enumerate(shown_lines):
    print(f"{begin + i + 1:5}  {line}")

# %% [markdown]
# | the code does | because |
# |---|---|
# | `absmax.clamp(min=1e-38)` | a block of zeros must not divide by zero |
# | `torch.clamp(..., -1, 1)` | the reciprocal is rounded, so the largest weight may come out a hair above 1 |
# | `if rem:` | the last block may be shorter than the others |
# | `if scaled.numel() % 2:` | an odd number of codes is filled up with a zero |
# | `if quant_type != "nf4":` | FP4's levels are not in ascending order of their bits |
# | `q8[::2] << 4` | the first code of two goes into the upper half |
#
# **Go and look** (nothing to hand in): on a GPU the same is written in CUDA, in the file `csrc/kernels.cu` of the
# bitsandbytes repository. Its function `dQuantizeNF4` finds the level with a tree of `if`s. How many comparisons does
# it need for one weight?
#
# <details><summary>Answer</summary>
#
# Four: each halves the sixteen levels, and $2^4 = 16$.
#
# </details>
#
# ### Three faults to know of
#
# On some processors (with AVX-512, as in many servers) the CPU path of bitsandbytes has faults that raise no error. This
# is what they look like on *this* machine:

# %%
from pefttools.bnb import find_faults

faults = find_faults()
print(f"gradients are lost after a first evaluation: {faults.gradients_lost}")
print(f"evaluation in bfloat16, whatever was asked for: {faults.eval_in_bf16} (relative difference {faults.eval_difference:.1e})")
print(f"wrong where d_in is no multiple of the block size: {faults.widths_wrong} (relative error {faults.width_error:.3f}; "
      f"right would be about 0.09)")

# %% [markdown]
# The codes are right in all three; it is what happens to them afterwards. `load_base` guards against them by calling
# `pefttools.bnb.make_safe`, and chapter 05, which trains, relies on that.

# %% [markdown]
# ## How large a block?
#
# Small blocks: small errors, many absmaxes. Large blocks: the reverse. Measure it on three kinds of weights: normal
# ones, those of the bundled model, and normal ones of which one in a thousand is eight times as large.

# %%
sizes = [16, 32, 64, 128, 256, 1024, 4096]
bits_of_size = [4 + 32 / size for size in sizes]
kinds = {"normal": normal, "normal with outliers": pictures.explorer_weights(1.0, outliers=1),
         "bundled model": all_weights[:1 << 19]}
by_size = {name: [relative_error(w, round_trip(w, NF4_CODE, size)) for size in sizes] for name, w in kinds.items()}
show(pictures.block_size_figure(by_size, sizes, bits_of_size), alt="NF4's relative error over block sizes 16 to 4096. " + "; ".join(
     f"{name}: from {v[0]:.3f} to {v[-1]:.3f}" for name, v in by_size.items()) + ". Bits per weight fall from 6 to 4.008.")
at64 = sizes.index(64)
grows = {name: values[-1] / values[at64] for name, values in by_size.items()}
print("error at 4096 against 64:", ", ".join(f"{name} {factor:.2f} ×" for name, factor in grows.items()))

# %% [markdown]
# *From 64 upwards there is at most half a bit left to save, and the error keeps growing; with outliers it grows fast.*
# Half a bit of 4.5 is worth a second thought all the same, and that is the next section.

# %% question="nf4-q-bits"

# %% [markdown]
# ## Double quantization
#
# One float32 for every 64 weights: $32/64 = 0.5$ bits a weight. QLoRA quantizes these numbers as well. They are all
# positive, so first their mean is taken off; then they are divided by an absmax of their own, one for every 256 of
# them, and rounded to one of 256 levels:
#
# $$m = \text{mean of all } a_j, \qquad a^{(2)} = \max_j |a_j - m|, \qquad d_j = \arg\min_k \left|\frac{a_j - m}{a^{(2)}} - t_k\right|, \qquad
# \hat a_j = m + a^{(2)}\, t_{d_j} .$$
#
# | symbol | what it is | stored |
# |---|---|---|
# | $a_j$ | absmax of the $j$-th block of 64 weights | no longer |
# | $m$ | their mean over the whole tensor, called `offset` | one float32 |
# | $a^{(2)}$ | absmax of 256 absmaxes | one float32 for 256 · 64 weights |
# | $t_k$ | 256 levels, $k = 0 \dots 255$ (the **dynamic** type: fine near 0, coarse outside) | once |
# | $d_j$ | the 8-bit code of an absmax | 8 bits for 64 weights |
#
# **Guess**, and then count with the last column of the table: how many bits a weight does that leave?
#
# <details><summary>Counted</summary>
#
# $$4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4 + 0.125 + 0.00195 \approx 4.127$$
#
# (The one mean for the whole tensor does not show in the third digit.)
#
# </details>

# %%
double_rows = {"NF4": {"codes": 4, "absmax, 32 bits for 64 weights": 32 / 64},
               "with double quantization": {"codes": 4, "absmax, 8 bits for 64 weights": 8 / 64,
                                            "absmax of absmaxes": 32 / (64 * 256)}}
show(pictures.budget_figure(double_rows), alt="Two bars of bits per weight, from 3.9 on. NF4: 4 for codes and 0.5 for absmax, 4.5 "
     "in all. With double quantization: 4 for codes, 0.125 for 8-bit absmaxes and a sliver of 0.002, 4.127 in all.")
saved_bits = sum(double_rows["NF4"].values()) - sum(double_rows["with double quantization"].values())
print(f"saved: {saved_bits:.3f} bits a weight; of 65 billion weights {65e9 * saved_bits / 8 / 1e9:.2f} GB")

# %% [markdown]
# *What is saved is 0.373 bits a weight.* Small? For a model of 65 billion weights it is 3 GB, as the line above counts.

# %% [markdown] exercise="double-quantize"
# Write `double_quantize(absmax, code, block_size)`.
#
# | argument | shape |
# |---|---|
# | `absmax` | `[n]` float32, the absmaxes of all blocks of a tensor |
# | `code` | `[k]`, ascending levels (256 in earnest, fewer in some of the check's cases) |
# | `block_size` | how many absmaxes share one $a^{(2)}$; **the last block may be shorter** |
# | *returns* | `(codes, absmax2, offset)`: `[n]` whole numbers, `[⌈n / block_size⌉]` float32, and the mean |
#
# *Why it matters:* the "bnb_4bit_use_double_quant=True" that you will write in chapter 05.

# %% exercise="double-quantize"
def double_quantize(absmax, code, block_size):
    """absmax [n] → (codes [n], absmax2 [ceil(n / block_size)], offset): the absmaxes, quantized in turn."""
    ### BEGIN SOLUTION
    offset = absmax.mean()
    codes, absmax2 = [], []
    for part in (absmax - offset).split(block_size):          # split makes the last part shorter where it has to
        largest = part.abs().max()
        codes.append(torch.bucketize(part / largest, (code[:-1] + code[1:]) / 2))
        absmax2.append(largest)
    return torch.cat(codes), torch.stack(absmax2), offset
    ### END SOLUTION

# %% check="double-quantize"
check("double-quantize", double_quantize)

# %% [markdown] hint="double-quantize" level="nudge"
# It is `nf4_quantize` once more, with another input: absmaxes without their mean in the place of weights, and other
# levels. Only the last block is new. A loop over `.split(block_size)` is a fine way to deal with it.

# %% [markdown] hint="double-quantize" level="shape"
# `(absmax - absmax.mean()).split(block_size)` gives the blocks, the last as short as it has to be. For each:
# `part.abs().max()` is a number, and `nearest_level(part / that, code)` its codes.

# %% [markdown] hint="double-quantize" level="code"
# ```python
# offset = absmax.mean()
# codes, absmax2 = [], []
# for part in (absmax - offset).split(block_size):
#     absmax2.append(part.abs().max())
#     codes.append(nearest_level(part / ..., code))
# return torch.cat(codes), torch.stack(absmax2), offset
# ```

# %% [markdown]
# ### Counted, from real bytes
#
# Formulas are patient. How large are the tensors? For the largest matrix of the bundled model, and for one of the shape
# of Llama-3.2-1B's feed-forward layer (8192 × 2048, here with normal numbers):

# %%
def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


wide = max(weights, key=lambda name: weights[name].numel())
rng = torch.Generator().manual_seed(2)
big = {wide.removeprefix("model."): weights[wide], "8192 × 2048": 0.02 * torch.randn(8192, 2048, generator=rng)}
measured_bits, dq_errors = {}, {}
for name, w in big.items():
    plain_q, double_q = quantize_nf4(w), quantize_nf4(w, double_quant=True)
    size = {"plain": bytes_of(plain_q.packed, plain_q.absmax),
            "double": bytes_of(double_q.packed, double_q.absmax, double_q.nested_absmax, double_q.offset)}
    measured_bits[name] = {k: 8 * b / w.numel() for k, b in size.items()}
    dq_errors[name] = [relative_error(w, q.dequantize()) for q in (plain_q, double_q)]
    print(f"{name} ({w.numel():,} weights; in 16 bits {2 * w.numel():,} bytes)")
    for k, b in size.items():
        print(f"   {k:7} {b:>11,} bytes = {8 * b / w.numel():.4f} bits a weight = 1/{2 * w.numel() / b:.2f} of 16 bits")
    print(f"   relative error {dq_errors[name][0]:.5f} → {dq_errors[name][1]:.5f}: {dq_errors[name][1] / dq_errors[name][0] - 1:+.2%}")

# %% [markdown]
# It costs hardly any accuracy. And the same against bitsandbytes, whose `compress_statistics=True` is this. Its CPU code
# looks the nearest of the 256 levels up in a table that is a little coarse; on a GPU it takes the true nearest. Our
# library can do either:

# %%
from pefttools.double_quant import quantize_8bit

different = nearest_differs = total_absmax = 0
for name, w in weights.items():
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    rest = quantize_nf4(w).absmax - state.offset
    codes, absmax2 = quantize_8bit(rest)
    different += count_different(codes, state.absmax) + count_different(absmax2, state.state2.absmax)
    nearest_differs += count_different(quantize_8bit(rest, nearest=True)[0], state.absmax)
    total_absmax += len(codes)
dynamic_equal = torch.equal(dynamic_codebook(), state.state2.code)
print(f"codes and absmax2 different from bitsandbytes on this CPU: {different} of {total_absmax:,}; "
      f"the 256 levels equal: {dynamic_equal}")
print(f"the true nearest level instead, as on a GPU: {nearest_differs} of {total_absmax:,} codes differ "
      f"({nearest_differs / total_absmax:.2%})")
mine = yours(lambda: double_quantize(quantize_nf4(w).absmax, dynamic_codebook(), 256))
if mine is not None:
    by_mine = count_different(mine[0].long(), quantize_8bit(quantize_nf4(w).absmax - mine[2], nearest=True)[0].long())
    print(f"yours, on the last matrix, against the true nearest: {by_mine} of {len(mine[0]):,} codes differ")
assert different == 0 and dynamic_equal

# %% [markdown]
# Not whole numbers from −127 to 127, then, as slide 000 has it ("8-bit integers"): a signed 8-bit type that is fine near
# zero, after the mean has been taken off. Does that matter?

# %%
some_absmax = quantize_nf4(big["8192 × 2048"]).absmax
scale_errors = {}
for name, values in {"8-bit integers on the absmaxes themselves": some_absmax,
                     "8-bit integers, mean taken off": some_absmax - some_absmax.mean(),
                     "dynamic type, mean taken off": some_absmax - some_absmax.mean()}.items():
    levels = dynamic_codebook() if "dynamic" in name else int8_levels
    back = round_trip(values, levels, 256)
    scale_errors[name] = ((back - values).norm() / some_absmax.norm()).item()
    print(f"{name:42} relative error of an absmax {scale_errors[name]:.2%}")

# %% [markdown]
# What helps most is taking off the mean. (For these absmaxes the dynamic type is not even better than integers; it
# earns its place where values spread over several orders of magnitude.) All three are far below the 9 % by which the
# weights themselves are rounded.

# %% [markdown] exercise="storage-bytes"
# Write `storage_bytes(n, block_size, double_quant)`: how many bytes `n` weights take, as a whole number.
#
# - codes: half a byte each; an odd last one takes a whole byte;
# - without double quantization: a float32 for every block, also for a last one that is not full;
# - with it: a byte for every block, a float32 for every 256 *blocks* (also for a last group that is not full), and one
#   float32 for the mean.
#
# *Why it matters:* with this you can say whether a model fits, before you download it. Chapter 09 builds on it.

# %% exercise="storage-bytes"
def storage_bytes(n: int, block_size: int = 64, double_quant: bool = False) -> int:
    """Bytes of n weights in NF4: codes and statistics."""
    ### BEGIN SOLUTION
    blocks = math.ceil(n / block_size)
    codes = math.ceil(n / 2)
    if double_quant:
        return codes + blocks + 4 * math.ceil(blocks / 256) + 4
    return codes + 4 * blocks
    ### END SOLUTION

# %% check="storage-bytes"
check("storage-bytes", storage_bytes)

# %% [markdown] hint="storage-bytes" level="nudge"
# Three things are stored: codes, something for each block, and, with double quantization, something for each 256 blocks
# and once. Count the blocks first, and round up.

# %% [markdown] hint="storage-bytes" level="shape"
# `math.ceil(n / block_size)` blocks. A float32 has 4 bytes. Check yourself: 64 weights take 32 + 4 bytes, and 64 · 256
# weights with double quantization 8192 + 256 + 4 + 4.

# %% [markdown] hint="storage-bytes" level="code"
# ```python
# blocks = math.ceil(n / block_size)
# if double_quant:
#     return math.ceil(n / 2) + blocks + 4 * ... + 4
# return math.ceil(n / 2) + ...
# ```

# %% [markdown]
# Slide 000 promises "4x memory savings" over 16 bits; sources 000 and 001 count half a byte a weight. **Predict** for
# the real Llama-3.2-1B: how much smaller does the whole model get?

# %%
from transformers import LlamaConfig, LlamaForCausalLM

with torch.device("meta"):         # the real model's shapes, without the numbers
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True))
in_linear = [layer.weight.numel() for name, layer in llama.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
whole = sum(p.numel() for p in llama.parameters())
left_over = 2 * (whole - sum(in_linear))                        # embedding (tied to the head) and norms, 16 bits
llama_q = {"half a byte for each (the sources)": whole / 2,
           "NF4": left_over + sum(n // 2 + 4 * (n // 64) for n in in_linear),
           "NF4, double quantization": left_over + sum(n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 for n in in_linear)}
print(f"Llama-3.2-1B: {whole:,} parameters, {sum(in_linear) / whole:.0%} of them in linear layers; 16 bits: {2 * whole / 1e9:.2f} GB")
for name, size in llama_q.items():
    print(f"   {name:36} {size / 1e9:.2f} GB   {2 * whole / size:.2f} × smaller")
seventy = {bits: 70e9 * bits / 8 / 1e9 for bits in (4, 4.5, 4 + 8 / 64 + 32 / (64 * 256))}
print("70 billion weights: " + ", ".join(f"{gb:.1f} GB at {bits:.3f} bits" for bits, gb in seventy.items()))

# %% [markdown]
# The linear layers shrink 3.6 to 3.9 times; the embedding does not shrink at all, and in a small model with a large
# vocabulary it is a fifth of everything. The larger the model, the nearer one comes to 3.9; to 4, never.

# %% question="nf4-q-double"

# %% [markdown]
# ## Which four bits?
#
# Rivals of NF4, all with 16 codes:
#
# - **INT4**: evenly spaced, −7/7 … 7/7, as int8 above;
# - **FP4**: a floating-point number of four bits: sign, two for the exponent, one for the fraction;
# - **Lloyd–Max**: the levels that make the mean squared error as small as it can be, for *these* weights. (Lloyd's
#   iteration: boundaries halfway between levels, each level to the mean of what falls to it, again and again. It is
#   what k-means does, in one dimension, and like k-means it may stop at a good place that is not the best. The cell
#   compares it with a search through all placements.)

# %%
def lloyd_levels(w, levels=16, block_size=64):
    """The levels with the least squared error for w in blocks: each scaled weight counts absmax² times."""
    blocks = w.flatten().view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    return lloyd_max((blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten(), levels=levels)


sample = all_weights[:1 << 20]
types = {"NF4": NF4_CODE, "FP4": fp4_codebook().sort().values, "INT4": int4_codebook(), "Lloyd–Max": lloyd_levels(sample)}
for_normal = {**types, "Lloyd–Max": lloyd_levels(normal)}
searched = {what: pictures.least_error_levels(w, 64) for what, w in {"normal numbers": normal, "the model": sample}.items()}
for (what, best), found, w in zip(searched.items(), (for_normal["Lloyd–Max"], types["Lloyd–Max"]), (normal, sample)):
    print(f"{what}: error after Lloyd's iteration {relative_error(w, round_trip(w, found)):.5f}, "
          f"by search {relative_error(w, round_trip(w, best)):.5f}")
show(pictures.ladders_figure({name: levels.tolist() for name, levels in types.items()}),
     alt="Levels of four data types between −1 and 1. NF4: close together near zero. FP4: symmetric, in groups. INT4: evenly "
         "spaced. Lloyd–Max: fairly even in the middle, outermost levels a little inside of −1 and 1.")

# %% [markdown]
# *FP4 has 0 twice (+0 and −0) and INT4 too: 15 different levels. (Three of FP4's, 0 and its two neighbours, are drawn
# all but on top of one another.) Lloyd–Max does not go all the way to ±1: only one weight of a block is there.*
#
# Which has the least error, on normal numbers and on the bundled model's weights? Put them in order before you run it.

# %%
errors = {"normal numbers": {name: relative_error(normal, round_trip(normal, levels)) for name, levels in for_normal.items()},
          "bundled model": {name: relative_error(all_weights, round_trip(all_weights, levels)) for name, levels in types.items()}}
show(pictures.types_figure(errors), alt="Relative error of four data types. " + " ".join(
     f"On {kind}: " + ", ".join(f"{name} {e:.3f}" for name, e in group.items()) + "." for kind, group in errors.items()))
n_err = errors["normal numbers"]
display(Markdown(f"*NF4 beats the other two fixed types, and **Lloyd–Max beats NF4** by {1 - n_err['Lloyd–Max'] / n_err['NF4']:.0%} of "
                 f"the error ({1 - (n_err['Lloyd–Max'] / n_err['NF4'])**2:.0%} of the squared error), on exactly normal numbers.*"))

# %% [markdown]
# So equal mass does not minimise the error, as source 001 has it: it is a different aim. NF4 is
# *information-theoretically* motivated (each code about equally often), and close to the best. That the model's weights
# give nearly the numbers of the normal ones suggests that they are nearly normal, block by block.
#
# FP4 is worse than INT4 here, and in table 2 of the QLoRA paper both its FP4 types are better than INT4, in perplexity.
# A contradiction? They are other types. **E2M1** has two bits of exponent and one of fraction, **E3M0** three and none.
# Put E2M1's levels beside those of bitsandbytes:

# %%
halves = {"E2M1": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6, "E3M0": torch.tensor([0, 0.25, 0.5, 1, 2, 4, 8, 16]) / 16}
papers = {name: torch.cat([-half.flip(0)[:-1], half]) for name, half in halves.items()}
for name, half in {"E2M1": halves["E2M1"], "bitsandbytes": fp4_codebook()[:8].sort().values}.items():
    print(f"{name:14}" + "".join(f"{v:8.4f}" for v in half.tolist()))

with_outliers = pictures.explorer_weights(1.0, outliers=2)
fp4_kinds = {"E2M1": papers["E2M1"], "E3M0": papers["E3M0"], "bitsandbytes' FP4": types["FP4"], "INT4": types["INT4"], "NF4": NF4_CODE}
fp4_errors = {name: (relative_error(normal, round_trip(normal, levels)),
                     relative_error(with_outliers, round_trip(with_outliers, levels, 4096))) for name, levels in fp4_kinds.items()}
print(f"\n{'relative error':20}{'normal, blocks of 64':>24}{'2 outliers in 1000, blocks of 4096':>38}")
for name, (a, b) in fp4_errors.items():
    print(f"{name:20}{a:24.4f}{b:38.4f}")

# %% [markdown]
# **One level** is elsewhere, the smallest: 0.0052 instead of 0.0833. It stands so close to 0 that it is hardly of use,
# and leaves a gap where most weights are. With it in its place FP4 is a little better than INT4. And E3M0, by far the
# worst on normal numbers, is the best of the five where a few large weights set the scale: its levels halve again and again.
# So there is no order of data types as such. There is one for each kind of weights and each block size, which is a
# thing to play with.

# %% [markdown]
# ## Play: a histogram and sixteen levels

# %%
pictures.explorer();

# %% [markdown]
# *Left the weights; in the middle the same after division by absmax, with the levels; on the right the error of all four
# types.* Things to try, with a guess before each:
#
# - Move **spread**. Which of the three pictures change? (Absmax takes the scale out: only the axis on the left.)
# - Add **outliers**, two in a thousand. Whom do they hurt least? Then make the blocks smaller.
# - Find a setting in which **FP4 beats INT4**. (Look for many outliers in large blocks.)
# - **Skew** the weights. NF4's two sides differ only by one level; does it care?

# %%
def explored(**settings):
    w = pictures.explorer_weights(**{k: v for k, v in settings.items() if k != "block_size"})
    size = settings.get("block_size", 64)
    return {name: pictures.relative_error(w, pictures.type_levels(name, w, size), size) for name in pictures.TYPES}


settings_tried = {"as it starts": {}, "spread 1.0": {"spread": 1.0}, "2 outliers in 1000": {"outliers": 2},
                  "2 outliers, blocks of 16": {"outliers": 2, "block_size": 16},
                  "2 outliers, blocks of 4096": {"outliers": 2, "block_size": 4096},
                  "20 outliers, blocks of 4096": {"outliers": 20, "block_size": 4096}, "skew 0.5": {"skew": 0.5}}
tried = {name: explored(**{"spread": 0.1, **values}) for name, values in settings_tried.items()}
print(f"{'':28}" + "".join(f"{name:>12}" for name in pictures.TYPES))
for name, row in tried.items():
    print(f"{name:28}" + "".join(f"{v:12.3f}" for v in row.values()))

# %% [markdown]
# Two outliers in a thousand hurt Lloyd–Max least, whose levels are made for the very weights, then NF4, which has many
# levels near 0 to spare. And NF4 does mind skew: about a quarter more error. Lloyd–Max need not be even on both sides, and
# has less than before.

# %% question="nf4-q-optimal"

# %% [markdown]
# ## On the real model
#
# An error of 9 % of the weights' size sounds like a lot. What does it do to a language model? Quantize all linear layers,
# dequantize them again, and take the loss on held-out rows.
#
# One number would say little: where a block happens to begin decides which way each weight is rounded. So each type is
# measured three times, with the blocks beginning at weight 0, at 21 and at 42. All three are equally good ways of doing
# the same. How far they scatter is luck, and a difference between types has to be larger.
#
# **Predict:** by how much does the loss of the base model (about 2.5) rise with NF4? And is Lloyd–Max best again?

# %%
rows = load_data("held_out").shuffle(seed=0).select(range(steps(96, quick=12)))
shifts = (0, 21, 42)[:steps(3, quick=2)]


@torch.no_grad()
def with_weights(change, originals):
    """Held-out loss with change(weight) in the place of every linear weight; the model is put back afterwards."""
    for name, layer in linears.items():
        layer.weight.copy_(change(originals[name]))
    loss = held_out_loss(model, tokenizer, rows)
    for name, layer in linears.items():
        layer.weight.copy_(originals[name])
    return loss


def losses_of(originals, types):
    return {name: [with_weights(lambda w: round_trip(w, levels, 64, shift), originals) for shift in shifts]
            for name, levels in types.items()}


def scatter(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


base_loss = held_out_loss(model, tokenizer, rows)
base_losses = losses_of(weights, types)
print(f"base model, not quantized: {base_loss:.3f}")
for name, values in base_losses.items():
    print(f"   {name:10} {scatter(values)}   (relative error of the weights {errors['bundled model'][name]:.3f})")

# %% [markdown]
# ± is the standard deviation over the three placements. Put the types in order once by the error of the weights and
# once by this loss:

# %%
by_error = sorted(types, key=errors["bundled model"].get)
by_loss = sorted(types, key=lambda name: statistics.mean(base_losses[name]))
below = [name for name in types if statistics.mean(base_losses[name]) < base_loss]
print("by error:", ", ".join(by_error), "    by loss of the base model:", ", ".join(by_loss))
print("below the model that was not quantized:", ", ".join(below) or "none")

# %% [markdown]
# The orders differ, and a quantized model may even come out *below* the original. Quantization does not improve a model.
# But the base model was never asked to follow instructions: its loss on these rows is high for reasons of its own, and
# shaking its weights moves it up as well as down. That makes it a poor instrument.
#
# So measure on something the model is good at. We fine-tune it on the instruction data for a minute (LoRA on all linear
# layers, then merged, as in chapter 02), and quantize *that*. Before and after, it answers some held-out prompts.

# %%
from pefttools import inject as adapters
from pefttools.lora import LoRAConfig

asked = load_data("held_out").shuffle(seed=1).select(range(steps(40, quick=4)))
prompts = [prompt_of(row) for row in asked]


def answers():
    return generate(model, tokenizer, prompts, max_new_tokens=steps(64, quick=24))


written = {"base model": answers()}
adapters.attach(model, LoRAConfig(r=16, alpha=32, target_modules="all-linear"), seed=0)
history = train(model, encoded(load_data("train"), tokenizer), tokenizer, steps=steps(100, quick=3), lr=3e-3, batch_size=16, seed=0)
adapters.merge(model)
for name, layer in list(adapters.adapter_layers(model)):
    model.set_submodule(name, layer.base_layer)                # plain layers again, with the merged weights in them
model.requires_grad_(False)
linears = {name: model.get_submodule(name) for name in weights}
tuned = {name: layer.weight.detach().clone() for name, layer in linears.items()}

# %%
show(history.plot("fine-tuning before quantization"), alt="Training loss of every step in grey and its running mean in blue: it falls "
     "steeply at first and then more slowly.")
tuned_loss = held_out_loss(model, tokenizer, rows)
display(Markdown(f"*Held-out loss {base_loss:.2f} → **{tuned_loss:.3f}** after {len(history.loss)} steps.*"))

# %%
tuned_all = torch.cat([w.flatten() for w in tuned.values()])
tuned_types = {**types, "Lloyd–Max": lloyd_levels(tuned_all[:1 << 20])}
tuned_losses = losses_of(tuned, tuned_types)
int8_loss = with_weights(lambda w: round_trip(w, int8_levels, 64), tuned)
nf4_4096 = with_weights(lambda w: round_trip(w, NF4_CODE, 4096), tuned)

show(pictures.loss_figure({"base model": base_losses, "fine-tuned model": tuned_losses},
                          {"base model": base_loss, "fine-tuned model": tuned_loss}),
     alt=f"Held-out loss of four data types, three placements each, a bar for the mean. Base model, {base_loss:.3f} not quantized: "
         + ", ".join(f"{k} {scatter(v)}" for k, v in base_losses.items()) + f". Fine-tuned model, {tuned_loss:.3f} not quantized: "
         + ", ".join(f"{k} {scatter(v)}" for k, v in tuned_losses.items()) + ".")
print(f"fine-tuned, not quantized {tuned_loss:.4f};  int8 in blocks of 64 {int8_loss:.4f};  NF4 in blocks of 4096 {nf4_4096:.4f}")
mean_of = {name: statistics.mean(values) for name, values in tuned_losses.items()}
order = sorted(mean_of, key=mean_of.get)
print("from best to worst:", ", ".join(f"{name} {scatter(tuned_losses[name])}" for name in order))
clear = [(a, b) for a, b in zip(order, order[1:]) if max(tuned_losses[a]) < min(tuned_losses[b])]
print("neighbours that no placement mixes up:", ", ".join(f"{a} before {b}" for a, b in clear) or "none")
finer, coarser = ([v for name in pair for v in tuned_losses[name]] for pair in (("NF4", "Lloyd–Max"), ("INT4", "FP4")))
print(f"NF4 and Lloyd–Max: {max(finer):.3f} at the most; INT4 and FP4: {min(coarser):.3f} at the least")
display(Markdown(f"*On what the model can do, NF4 costs {mean_of['NF4'] - tuned_loss:.3f} nats a token, FP4 {mean_of['FP4'] - tuned_loss:.3f}, "
                 f"INT4 {mean_of['INT4'] - tuned_loss:.3f} and Lloyd–Max {mean_of['Lloyd–Max'] - tuned_loss:.3f}; 8 bits cost "
                 f"{int8_loss - tuned_loss:.4f}.*"))

# %% [markdown]
# On a task that the model can do, the loss goes with the error of the weights: the two types with the smaller errors,
# NF4 and Lloyd–Max, come out below the two with the larger ones, and 8 bits cost next to nothing. (One small model, one
# task, a short training: a measurement and not a law.)
#
# Seen by a reader: what does the fine-tuned model write in 16 bits, in 4, in 3, in 2? For 3 and 2 bits we take Lloyd–Max
# levels, whose error is the least that 8 and 4 levels can have.

# %%
few_bits = {"3 bits": lloyd_levels(tuned_all[:1 << 20], levels=8), "2 bits": lloyd_levels(tuned_all[:1 << 20], levels=4)}
written["fine-tuned"] = answers()
low_bits = {"fine-tuned": tuned_loss}
for name, levels in {"NF4": NF4_CODE, **few_bits}.items():
    with torch.no_grad():
        for path, layer in linears.items():
            layer.weight.copy_(round_trip(tuned[path], levels))
    written[name] = answers()
    low_bits[name] = held_out_loss(model, tokenizer, rows)
    with torch.no_grad():
        for path, layer in linears.items():
            layer.weight.copy_(tuned[path])

for i in (0, 1):
    print("─" * 100 + "\n" + prompts[i].strip())
    for name, texts in written.items():
        print(f"  [{name}]\n" + "\n".join("    " + line for line in texts[i].strip().splitlines()[:5]))

# %% [markdown]
# Forty answers each, counted: how many are a program at all (a fenced block that Python can read), and how many are word for
# word what the fine-tuned model wrote before it was quantized?

# %%
def is_program(answer):
    try:
        return "```" in answer and bool(ast.parse(code_of(answer)).body)
    except (SyntaxError, ValueError):
        return False


few_error = {name: relative_error(tuned_all, round_trip(tuned_all, levels)) for name, levels in {"NF4": NF4_CODE, **few_bits}.items()}
programs = {name: sum(map(is_program, texts)) for name, texts in written.items()}
same = {name: sum(a == b for a, b in zip(texts, written["fine-tuned"])) for name, texts in written.items()}
print(f"{'':12}{'error of the weights':>22}{'held-out loss':>16}{'programs':>11}{'word for word':>16}   (of {len(prompts)} answers)")
for name in written:
    print(f"{name:12}{few_error.get(name, 0):22.3f}{low_bits.get(name, base_loss):16.2f}{programs[name]:11}{same[name]:16}")

# %% [markdown]
# Each bit fewer about doubles the error of the weights. The *form* of an answer survives for long: with three bits about as
# many answers are programs as before. Its content does not: already with four bits only some are word for word the same, and
# with two bits none. Another word need not be a worse one; how much worse they are on average is what the loss says.
#
# There are methods for less than four bits. They need more than rounding (calibration data, or training on top), and this
# chapter ends here.

# %% [markdown]
# ## The sources say, we measured
#
# The right columns are filled in by the code of this notebook.

# %%
def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


gaps = NF4_CODE.diff()
in_blocks = shares["in blocks of 64, divided by absmax"]
zero_back = round_trip(torch.tensor([0.0, 0.3, -0.7, 0.1]), NF4_CODE, 4)[0].item()
zero_by_slide = slide_back[3].item()
rise = {"base": statistics.mean(base_losses["NF4"]) - base_loss, "tuned": mean_of["NF4"] - tuned_loss}
best_bits = min(measured_bits["8192 × 2048"].values())
double_costs = dq_errors["8192 × 2048"][1] / dq_errors["8192 × 2048"][0] - 1
dynamic_steps = dynamic_codebook().diff()
table = [
    ("source", "it says", "we measured", ""),
    ("---",) * 4,
    ("000", "a block is normalised by its mean and standard deviation",
     f"by its absmax (that gives bitsandbytes' bytes, with {sum(unequal.values())} differences); a weight of 0 comes back as "
     f"{zero_back:g}, the slide's way as {zero_by_slide:.3f}", verdict(any(unequal.values()))),
    ("000", "a codebook from −1.51 to 1.00; values clipped to [−2, 2]",
     f"from −{-NF4_CODE.min():g} to {NF4_CODE.max():g} with an exact 0: {negative} below, {positive} above; nothing to clip",
     verdict(NF4_CODE.min() < -1.5)),
    ("000", "−0.357 → 0101, −0.527 → 0101",
     f"{slide_codes[0]:04b} and {slide_codes[4]:04b}: {wrong_codes} of 6 codes wrong, and 0.5 has $z$ = {z[5]:.3f}, not 0.736",
     verdict(wrong_codes == 0)),
    ("000", "0.47 becomes something like 0110", f"with that codebook {code_of_047:04b}", verdict(code_of_047 == 0b0110)),
    ("000", "NF4 is *learned* from large models' weights",
     f"quantiles of the normal distribution: the formula gives bitsandbytes' table to {off_float64:.0e}, and with a difference "
     f"of {off_float32:g} where it is rounded as there", verdict(off_float64 > 1e-5)),
    ("bitsandbytes, a docstring", "8 negative and 9 positive values (including zero)",
     f"{negative} negative, zero, {positive} positive", verdict((negative, positive + 1) == (8, 9))),
    ("000", "not uniformly spaced, densely packed around 0",
     f"steps from {gaps.min():.3f} next to 0 to {gaps.max():.3f} at the end",
     verdict(gaps.argmin() in (6, 7) and gaps.argmax() in (0, 14))),
    ("001", "16 bins of equal probability mass", f"in blocks of 64 from {min(in_blocks):.1%} to {max(in_blocks):.1%}",
     verdict(max(in_blocks) < 1.3 * min(in_blocks), wrong="✗ at work")),
    ("001", "which minimises the quantization error",
     f"normal numbers: NF4 {n_err['NF4']:.4f}, Lloyd–Max {n_err['Lloyd–Max']:.4f}", verdict(n_err["NF4"] <= n_err["Lloyd–Max"])),
    ("000, the abstract", "information-theoretically optimal for normal weights", f"a code carries {code_bits:.2f} of 4 bits",
     verdict(code_bits > 3.99, wrong="nearly" if code_bits > 3.8 else "✗")),
    ("000, 001", "half a byte a weight; 70B in 35 GB",
     f"4.5 bits, {seventy[4.5]:.1f} GB; with double quantization {best_bits:.3f} bits, "
     f"{seventy[4 + 8 / 64 + 32 / (64 * 256)]:.1f} GB; embeddings not counted", verdict(best_bits < 4.01)),
    ("000", "4 × less memory than 16 bits",
     f"the matrices {16 / 4.5:.2f} to {16 / best_bits:.2f} times less, all of Llama-3.2-1B "
     f"{2 * whole / llama_q['NF4, double quantization']:.2f} times", verdict(16 / best_bits > 3.95)),
    ("000", "scales become 8-bit integers",
     f"after the mean is taken off, a signed 8-bit type with {len(dynamic_steps) + 1} uneven levels (steps from "
     f"{dynamic_steps.min():.0e} to {dynamic_steps.max():.2f})", verdict(dynamic_steps.max() < 1.01 * dynamic_steps.min())),
    ("000", "without degrading quality (double quantization)", f"error of the weights {double_costs:+.2%}",
     verdict(double_costs < 0.01)),
    ("000", "no performance loss with NF4",
     f"held-out loss of the fine-tuned model {tuned_loss:.3f} → {mean_of['NF4']:.3f}; of the base model {rise['base']:+.3f}, "
     f"± {statistics.stdev(base_losses['NF4']):.3f} by placement", verdict(rise["tuned"] < 0.005, "✓ here", "✗ by itself")),
    ("QLoRA, table 2", "FP4 beats INT4 (perplexity)",
     f"error on normal weights: E2M1 {fp4_errors['E2M1'][0]:.4f}, INT4 {fp4_errors['INT4'][0]:.4f}, bitsandbytes' FP4 "
     f"{n_err['FP4']:.4f}", "; ".join(f"{name} {verdict(error < fp4_errors['INT4'][0])}" for name, error in
                                      (("E2M1", fp4_errors["E2M1"][0]), ("bitsandbytes'", n_err["FP4"])))),
]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in table)))

# %% [markdown]
# (That a model fine-tuned *on top of* the quantized weights can make up for the loss is QLoRA's claim. It is another
# one, and chapter 05 tests it.)
#
# ## Summary
#
# | | |
# |---|---|
# | quantize | $a = \max \lvert w \rvert$ of a block; $c$ = number of the level nearest to $w/a$ |
# | dequantize | $\hat w = a \cdot \ell_c$, in float32, rounded once |
# | NF4's levels | $\Phi^{-1}$ of evenly spaced $p$: 7 below zero, 0, 8 above; divided by the largest; no data in it |
# | blocks | 64 weights share an absmax; an outlier spoils its own block only |
# | stored | two codes a byte, the first in the upper half; one float32 a block: 4.5 bits |
# | double quantization | absmaxes minus their mean, in 8 bits, one float32 per 256: 4.127 bits |
# | error on normal weights | NF4 about 9 %; smaller than FP4's and INT4's, larger than Lloyd–Max's |
# | not quantized | embeddings, output head, norms |
#
# **Read**
#
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): section 3 (NF4, equation 4; double quantization), table 2,
#   and appendix E, the sixteen numbers.
# - Dettmers et al. 2022, [LLM.int8()](https://arxiv.org/abs/2208.07339): section 2.1 (absmax) and 3.2 (outliers).
# - Yoshida 2023, [NF4 Isn't Information Theoretically Optimal](https://arxiv.org/abs/2306.06965): what you measured on block
#   size and equal mass, worked out.
# - Lloyd 1982, *Least squares quantization in PCM*: written in 1957, and still the answer.
# - `pefttools/codebook.py`, `nf4.py` and `double_quant.py`; `bitsandbytes/functional.py`.
#
# **Next.** Chapter 05 trains LoRA on top of a model whose weights you have just put into four bits: QLoRA.
