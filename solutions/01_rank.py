# ---
# title: Rank and low-rank structure
# minutes: 90
# needs: 00_start
# ---
# %% [markdown]
# The methods of this course train a model by moving very few numbers. Why should that be possible at all? This
# chapter is about the two ideas behind it: the **rank** of a matrix, which says how many directions it really uses,
# and the **intrinsic dimension** of a task, which says how many directions training really needs. They are often
# mixed up. You will measure both on a real model, and see where they part.
#
# **After this chapter you can**
#
# - find the rank of a matrix by hand, and in floating point without being fooled by rounding;
# - cut a matrix down to rank $k$ in the best possible way, and say beforehand what that costs and what it saves;
# - say which matrices of a language model can be cut (and which can not), from spectra that you have measured;
# - train a whole model inside a random subspace, and read off its intrinsic dimension $d_{90}$;
# - tell what a rank-deficient layer can and cannot learn, where one of our sources is wrong about it.

# %%
import copy
import inspect
import logging
import textwrap
import warnings
from fractions import Fraction

import numpy as np
import torch
from IPython.display import Markdown, display
from torch import nn

from pefttools.elimination import row_echelon as library_row_echelon
from pefttools.grading import case, check
from pefttools.rank import effective_rank as library_effective_rank
from pefttools.rank import low_rank as library_low_rank
from pefttools.rank import matrix_rank as library_rank
from pefttools.widgets import rank as pictures
from pefttools.widgets import start as pictures_of_00
from pefttools.widgets.base import show



def listed(values: dict, form: str = "") -> str:
    """{"a": 1, "b": 2} → "a 1, b 2", each value in that format."""
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


print("ready: torch", torch.__version__)

# %% [markdown]
# ## The picture
#
# A layer with the weight $W$ takes $n$ numbers $x$ and gives $m$ numbers $y = Wx$. Feed it a cloud of inputs that
# point in all directions, and look at the outputs. Here are three layers with three outputs each:

# %%
show(pictures.plane_picture(), alt="Three clouds of points in space. Rank 3: they fill it. Rank 2: all lie in a plane, which is "
     "drawn. Rank 1: all lie on a line.")

# %% [markdown]
# *All three layers have three outputs. Only the first one uses three directions.*
#
# The **rank** of $W$ is the number of dimensions that its outputs fill. It is also, and this is a theorem and no
# accident,
#
# - the number of rows of $W$ that are independent (none of them a sum of multiples of the others),
# - the number of *columns* that are independent,
# - the smallest $k$ for which $W$ is a product of an $m \times k$ and a $k \times n$ matrix.
#
# The last one is what this course lives on:

# %%
show(pictures.product_picture(), alt="A hatched 6 by 8 block W, 48 numbers, equals a tall 6 by 2 block B times a wide 2 by 8 block A, "
     "together 28 numbers.")

# %% [markdown]
# *A matrix of rank 2 is two columns times two rows; the smaller the rank, the fewer the numbers.*
#
# $$W = B\,A, \qquad W\colon m \times n,\quad B\colon m \times k,\quad A\colon k \times n .$$
#
# | symbol | what it is |
# |---|---|
# | $W$ | a matrix, $m$ rows (outputs) and $n$ columns (inputs) |
# | $k$ | its rank, or a rank that we choose; at most the smaller of $m$ and $n$ |
# | $B$, $A$ | two thin factors, $m \times k$ and $k \times n$ |

# %% [markdown]
# ## By hand: elimination
#
# How does one find the rank? One of our sources (000) does it with this matrix:
#
# $$A = \begin{pmatrix} 1 & 2 & 3 \\ 2 & 4 & 6 \\ 1 & 1 & 1 \end{pmatrix}$$
#
# Before you go on: can you see a row that says nothing new?
#
# Three operations change a matrix and leave alone what its rows can be combined to: **exchange** two rows,
# **multiply** a row by a number other than 0, **subtract** a multiple of one row from another. Use them to make as
# many entries zero as possible:
#
# 1. $R_2 - 2R_1 = (2,4,6) - (2,4,6) = (0,0,0)$. The second row was twice the first.
# 2. $R_3 - R_1 = (1,1,1) - (1,2,3) = (0,-1,-2)$.
# 3. Put the zero row last. What is left is $(1,2,3)$, $(0,-1,-2)$, $(0,0,0)$: **two** rows that are not zero, and
#    neither is a multiple of the other, since the second starts with a 0. The rank is 2.
#
# A row's first entry other than 0 is its **pivot**. One may go on, make the pivots 1, and clear the entries above them
# too; that is the **reduced** form, which you will write. The order is always the same: column by column from the left;
# in each column look for a row that has something there and has no pivot yet, bring it up, and clear the column. A column
# in which there is no such row is passed over. The same in code, with every step ($\leftarrow$ means "becomes",
# $\leftrightarrow$ "change places"):

# %%
A = [[1, 2, 3], [2, 4, 6], [1, 1, 1]]
by_elimination = library_row_echelon(A, reduced=True)
print(by_elimination)
as_on_the_slide = [[1, 0, -1], [0, 1, 2], [0, 0, 0]]
slide_agrees = sorted(map(list, by_elimination.matrix)) == sorted(as_on_the_slide)
print("the same rows as at the end of the slides (there the zero row stands in the middle):", slide_agrees)

# %% [markdown]
# Step through it, and through harder ones: fractions, rows that have to change places, and a wide matrix. Before each
# step, say what you would do.

# %%
pictures.elimination_stepper();

# %% [markdown]
# *Filled: the row that changes. Dashed: what the operation looks at. Ringed, at the end: the pivots. There are as
# many of them as the rank.*

# %% [markdown] exercise="row-operation"
# Write `subtract_row(A, target, source, column)`: from the row `target` subtract that multiple of the row `source`
# which makes the entry in `column` zero. Return the new matrix; leave `A` as it is.
#
# | argument | what it is |
# |---|---|
# | `A` | a list of rows, each a list of `Fraction`s (exact: `Fraction(1, 3) * 3 == 1`) |
# | `target`, `source`, `column` | counted from 0; `A[source][column]` is not 0 |
# | *returns* | a list of rows |
#
# *Why it matters:* elimination is this operation and nothing else, over and over.

# %% exercise="row-operation"
def subtract_row(A, target: int, source: int, column: int):
    """A with a multiple of row `source` taken from row `target`, so that entry [target][column] is 0."""
    ### BEGIN SOLUTION
    factor = A[target][column] / A[source][column]
    B = [list(row) for row in A]
    B[target] = [a - factor * b for a, b in zip(A[target], A[source])]
    return B
    ### END SOLUTION

# %% check="row-operation"
check("row-operation", subtract_row)

# %% [markdown]
# (Want to try your function on the very numbers that the check uses? `case("row-operation", 1)` gives the inputs of
# its first case. And each exercise says in its message which case it was.)

# %% [markdown] hint="row-operation" level="nudge"
# The target has $t$ in that column, the source has $s$. Which multiple $f$ of $s$ gives $t - f s = 0$?

# %% [markdown] hint="row-operation" level="shape"
# $f = t / s$, that is `A[target][column] / A[source][column]`. Copy the rows (`[list(row) for row in A]`), then
# replace the one.

# %% [markdown] hint="row-operation" level="code"
# ```python
# factor = ... / ...
# B = [list(row) for row in A]
# B[target] = [a - ... * b for a, b in zip(A[target], ...)]
# return B
# ```

# %% [markdown] exercise="row-echelon"
# Write `row_echelon(A)`, the **reduced row echelon form**: `A` is a list of rows of `Fraction`s; return a new list of
# as many rows such that
#
# - in every row that is not all zeros the first entry other than 0 is a 1, its pivot, and everything else in the pivot's
#   column is 0, above it and below it;
# - each pivot is further right than the one above it; rows of zeros come last.
#
# Each matrix has exactly one such form, whichever way you reach it.
#
# *Why it matters:* the number of rows that are not zero is the rank, with no tolerance and no doubt.

# %% exercise="row-echelon"
def row_echelon(A):
    """The reduced row echelon form of a list of rows of Fractions."""
    ### BEGIN SOLUTION
    R = [list(row) for row in A]
    top = 0                                               # the row that waits for a pivot
    for column in range(len(R[0])):
        found = next((i for i in range(top, len(R)) if R[i][column] != 0), None)
        if found is None:
            continue
        R[top], R[found] = R[found], R[top]
        pivot = R[top][column]
        R[top] = [x / pivot for x in R[top]]
        for i in range(len(R)):
            if i != top:
                factor = R[i][column]
                R[i] = [a - factor * b for a, b in zip(R[i], R[top])]
        top += 1
    return R
    ### END SOLUTION

# %% check="row-echelon"
check("row-echelon", row_echelon)

# %% [markdown] hint="row-echelon" level="nudge"
# Go through the columns from left to right, and keep in mind which row is waiting for a pivot (at first the topmost).
# In a column: look for a row, from the waiting one down, that is not zero there. What if there is none? And if it is
# not the waiting one?

# %% [markdown] hint="row-echelon" level="shape"
# Found one: exchange it with the waiting row, divide that row by its pivot, subtract it from *every* other row so
# that their entries in this column become 0; then the next row waits. Found none: the next column, and the *same* row
# goes on waiting.

# %% [markdown] hint="row-echelon" level="code"
# ```python
# R, top = [list(row) for row in A], 0
# for column in range(len(R[0])):
#     found = next((i for i in range(top, len(R)) if R[i][column] != 0), None)
#     if found is None:
#         ...
#     R[top], R[found] = ...
#     R[top] = [x / ... for x in R[top]]
#     for i in range(len(R)):
#         if i != top:
#             ...
#     top += 1
# return R
# ```

# %% [markdown]
# Why all this care about fractions? Take a matrix whose third row is the sum of the other two, and eliminate once
# with fractions and once with floats, where a pivot of any size counts:

# %%
tenths = [[1, 2, 3], [4, 5, 6], [5, 7, 9]]                     # R3 = R1 + R2
exact = library_row_echelon([[Fraction(x, 10) for x in row] for row in tenths])
floats = library_row_echelon([[x / 10 for x in row] for row in tenths], tol=0.0)
tolerant = library_row_echelon([[x / 10 for x in row] for row in tenths])
print("exact:", exact.rank, "   floats, anything but 0 is a pivot:", floats.rank, "   floats, with a tolerance:", tolerant.rank)
print(f"the third pivot of the middle one: {floats.matrix[2][2]:.1e}")
sums = {f"{a / 10} + {b / 10}": (a / 10 + b / 10, c / 10) for a, b, c in zip(*tenths)}
for name, (found, wanted) in sums.items():
    print(f"   in floats {name} = {found!r}" + (f", not {wanted!r}" if found != wanted else ""))
assert sums["0.3 + 0.6"][0] != 0.9 and floats.rank == 3 and exact.rank == tolerant.rank == 2

# %% [markdown]
# In floats 0.3 + 0.6 is not quite 0.9, a crumb of some $10^{-16}$ remains, and the crumb is counted as a direction.
# Real weights have been rounded at every step, so that hardly any sum in them is exact. So from here on "rank" means **rank up to a tolerance**, and the
# tool is another one: the singular values, below.
#
# (Source 000 ends with the rule to count the non-zero rows or columns, "whichever is minimum". After row elimination
# that comes out right, because there are never fewer non-zero columns than pivots. Before elimination it does not:)

# %%
def rule_of_the_slide(matrix) -> int:
    rows = sum(any(row) for row in matrix)
    columns = sum(any(column) for column in zip(*matrix))
    return min(rows, columns)


equal_rows = [[1, 1], [1, 1]]
print("before elimination:", rule_of_the_slide(equal_rows), "  after:", rule_of_the_slide(library_row_echelon(equal_rows).matrix))
rng = torch.Generator().manual_seed(0)
some = [(torch.randint(-2, 3, (4, 2), generator=rng) @ torch.randint(-2, 3, (2, 5), generator=rng)).tolist() for _ in range(50)]
rule_holds = all(rule_of_the_slide((done := library_row_echelon(m)).matrix) == done.rank for m in some)
print("after elimination, on 50 random matrices, the rule gives the rank:", rule_holds)

# %% [markdown]
# ## A layer of low rank
#
# Source 000 has an example: a layer with **100 outputs** whose weight has **rank 10**. It says four things about it.
#
# 1. Only 10 outputs are independent; the other 90 are combinations of these.
# 2. The 90 add no degrees of freedom: the layer behaves as if it had 10 outputs.
# 3. The 90 have no influence on the decision by themselves.
# 4. The gradients that flow back through the 90 carry nothing new, and updates to their weights will not help to
#    learn.
#
# Build it, and look. Which of the four would you bet on?

# %%
rng = torch.Generator().manual_seed(1)
n, m, k = 64, 100, 10
W = torch.randn(m, k, generator=rng) @ torch.randn(k, n, generator=rng) / (k * n) ** 0.5
x = torch.randn(1000, n, generator=rng)
y = x @ W.T                                                  # [1000, 100]
rank_W, rank_y = library_rank(W), library_rank(y)
first_ten = y[:, :k]
rest = torch.linalg.lstsq(first_ten, y).solution             # [10, 100]: the best first_ten @ rest ≈ y (least squares)
rest_error = ((first_ten @ rest - y).norm() / y.norm()).item()
print(f"rank of W: {rank_W}, rank of 1000 outputs: {rank_y}; all 100 outputs from the first ten, error {rest_error:.0e}")

# %% [markdown]
# So 1 holds. Now 2 and 3: if 90 outputs say nothing of their own, can we take them away? A layer $V$ reads them. Drop
# 90, or *fold* them (give $V$ the ten, and put the combinations into $V$):

# %%
V = torch.randn(20, m, generator=rng) / m**0.5               # the next layer, 100 → 20
after_all = y @ V.T
dropped = ((first_ten @ V[:, :k].T - after_all).norm() / after_all.norm()).item()
folded = ((first_ten @ (V @ rest.T).T - after_all).norm() / after_all.norm()).item()
rank_relu = library_rank(torch.relu(y))
bent = torch.relu(y)
rest_of_bent = torch.linalg.lstsq(bent[:, :k], bent).solution
relu_error = ((bent[:, :k] @ rest_of_bent - bent).norm() / bent.norm()).item()
print(f"90 outputs dropped: the next layer's result is off by {dropped:.0%};  folded into the other ten: {folded:.0e}")
print(f"behind a ReLU the 100 outputs have rank {rank_relu}; from the first ten they can no longer be made (error {relu_error:.0%})")

# %% [markdown]
# - They can be **folded**, exactly, as long as all that follows is linear: so much is right of 2. (Merging and cutting
#   matrices live on that.)
# - They cannot be **dropped**: the next layer counts on them, so 3 is wrong as it stands.
# - Behind a **nonlinearity** even folding ends: a ReLU bends each of the 100 combinations at another place, and the
#   100 numbers that come out fill 100 dimensions. (So a wide layer behind a narrow one is not wasted, as long as
#   something bends in between.)
#
# Now the fourth claim. **Predict:** we train $W$, all of its 6,400 numbers, by plain gradient descent towards a
# target layer of full rank. After *one* step, what is the rank of $W$?

# %%
my_guess = None

# %%
target = torch.randn(m, n, generator=rng) / n**0.5
inputs = torch.randn(256, n, generator=rng)


def mse(weight):
    return (inputs @ (weight - target).T).square().mean()


def descend(weight, parameters, lr, steps=40):
    """Gradient descent on `parameters`; weight() builds W from them. The ranks and losses of every step."""
    ranks, losses = [], []
    for step in range(steps + 1):
        loss = mse(weight())
        ranks.append(library_rank(weight().detach()))
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, parameters)
        if step == 0:
            first = grads[0]
        with torch.no_grad():
            for p, g in zip(parameters, grads):
                p -= lr * g
    return ranks, losses, first


free = W.clone().requires_grad_()
ranks_free, losses_free, gradient = descend(lambda: free, [free], lr=20.0)    # large, as the mean is over 25,600 errors
U, S, Vh = torch.linalg.svd(W, full_matrices=False)
b, a = (U[:, :k] * S[:k].sqrt()).requires_grad_(), (S[:k].sqrt()[:, None] * Vh[:k]).requires_grad_()
ranks_factors, losses_factors, _ = descend(lambda: b @ a, [b, a], lr=5.0, steps=40)

# The best that any matrix of rank 10 can do: the nearest one to the target, distances measured through the inputs
root = torch.linalg.cholesky(inputs.T @ inputs)              # ‖X Mᵀ‖ = ‖M root‖ for any M
left_out = torch.linalg.svdvals(target @ root)[k:]
floor = (left_out.square().sum() / (256 * m)).item()
rank_gradient, rank_one_step = library_rank(gradient), ranks_free[1]
print(pictures_of_00.compare_guess(my_guess, rank_one_step))
print(f"rank of the gradient: {rank_gradient};  rank of W: {ranks_free[0]} at the start, {rank_one_step} after one step")
both = {"all of W trains": losses_free, "only B and A train (rank 10)": losses_factors}
show(pictures.gradient_figure(ranks_free[:12], both, floor), alt=f"Left: the rank of W jumps from {ranks_free[0]} to "
     f"{rank_one_step} in the first step and stays. Right: the loss of the free W falls from {losses_free[0]:.2f} to "
     f"{losses_free[-1]:.1g}, far below the floor of rank 10 at {floor:.2f}; with B and A it stays above.")

# %%
moved_rows = (free.detach() - W).norm(dim=1)                  # how far each of the 100 rows has moved
display(Markdown(
    f"*The gradient has rank **{rank_gradient}**, and so has $W$ after one step. All of $W$ training, the loss goes from "
    f"{losses_free[0]:.2f} to {losses_free[-1]:.1g}; no matrix of rank 10 can get below {floor:.2f}, and the factors $B$ and $A$ end at "
    f"{losses_factors[-1]:.2f}. The 90 “redundant” rows moved as far as the other ten: {moved_rows[10:].mean():.2f} and "
    f"{moved_rows[:10].mean():.2f} on average.*"))

# %% [markdown]
# So the fourth claim is **wrong**, and it is worth seeing why. Write $\delta$ for the gradient of the loss at the
# outputs. For one example the gradient of the weight is
#
# $$\frac{\partial L}{\partial W} = \delta\,x^\top, \qquad \delta\colon m,\quad x\colon n,$$
#
# one column times one row: rank 1. Over a batch these are added up, and the sum has as many independent directions as
# the $\delta$s and the $x$s allow. **$W$ does not occur in it** (only in $\delta$, through the error). Two outputs that say
# the same today are pulled in different directions if their targets differ, and tomorrow they no longer say the same.
#
# Two things *are* held at rank 10. One is the gradient that is sent further **down**, $W^\top\delta$, for as long as $W$ has
# that rank. The other is a $W$ that is **built** as $BA$: there the low rank is not in the numbers but in the construction,
# and training cannot leave it. LoRA is of this kind.

# %%
delta = 2 * (inputs @ (W - target).T) / (256 * m)            # [256, 100]
down = delta @ W                                             # what the layer below receives
rank_down = library_rank(down)
one_delta = torch.outer(delta[0], inputs[0])
print("∂L/∂W = Σ δxᵀ:", torch.allclose(delta.T @ inputs, gradient, atol=1e-7))
print(f"rank of the gradient for one example: {library_rank(one_delta)}, for 256: {rank_gradient}")
print(f"rank of δ: {library_rank(delta)}, of what is sent down, δ W: {rank_down}")
print(f"rank of B·A after training: {ranks_factors[-1]}")

# %% question="rank-q-gradient"

# %% [markdown]
# ## Singular values: rank with shades of grey
#
# Rank says whether a direction is used. It does not say how much. The **singular value decomposition** (SVD) does. It
# writes any $m \times n$ matrix as a sum of matrices of rank 1, sorted by size:
#
# $$W = \sigma_1 u_1 v_1^\top + \sigma_2 u_2 v_2^\top + \dots = U S V^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0 .$$
#
# | symbol | what it is | size |
# |---|---|---|
# | $v_i$, columns of $V$ | directions at the input, of length 1, at right angles to each other | $n$ |
# | $u_i$, columns of $U$ | where they are sent, also of length 1 and at right angles | $m$ |
# | $\sigma_i$, diagonal of $S$ | **singular values**: how much longer they become on the way | one number each |
#
# (In code `Vh` is $V^\top$: its *rows* are the $v_i$.) The rank is the number of $\sigma_i$ that are not 0. See it on a picture, which is a matrix too (one number per
# pixel). Keep the first $k$ terms of the sum:

# %%
image = pictures.sample_image()
errors_image = {k: (torch.linalg.svdvals(image)[k:].norm() / image.norm()).item() for k in (1, 3, 8, 20)}
show(pictures.strip_figure(image), alt="A drawing of a house, hills, a sun and a fence at rank 1, 3, 8 and 20 and in full. "
     "Errors: " + ", ".join(f"k = {k}: {v:.0%}" for k, v in errors_image.items()) + ". At 3 the house shows, at 8 the sun "
     "is a square, at 20 it is round.")

# %% [markdown]
# *What runs along rows and columns (sky, fence, walls) costs few terms; the round sun and the slanting roof cost
# many.*
#
# By hand, for the diagonal matrix with 4, 2, 1, 1 on its diagonal: the singular values are just these. Its rank is 4.
# Keep $k = 2$: what is left out is 1 and 1, so the distance is $\sqrt{1^2 + 1^2} = \sqrt 2$. In code, together with
# what source 003 says about how to compute them: the $v_i$ are eigenvectors of $W^\top W$, the $u_i$ of $WW^\top$,
# the $\sigma_i$ the roots of the eigenvalues.

# %%
by_hand = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
B, A = library_low_rank(by_hand, 2)
print("distance to rank 2:", round((by_hand - B @ A).norm().item(), 4), "= √2;  rank", library_rank(by_hand))

rng = torch.Generator().manual_seed(2)
small = torch.randn(5, 8, generator=rng, dtype=torch.float64)
U, S, Vh = torch.linalg.svd(small, full_matrices=False)
roots = torch.linalg.eigvalsh(small @ small.T).flip(0).sqrt()
eigen_error = max((roots - S).abs().max().item(), (small.T @ small @ Vh.T - Vh.T * S.square()).abs().max().item(),
                  (small @ small.T @ U - U * S.square()).abs().max().item())
print(f"003's way to the singular values and vectors, difference to the SVD: {eigen_error:.0e}")

# On paper. In the computer the squaring costs half of the digits:
steep = (torch.linalg.qr(torch.randn(40, 4, generator=rng)).Q * torch.tensor([1.0, 1e-2, 1e-4, 1e-6])) @ torch.linalg.qr(
    torch.randn(30, 4, generator=rng)).Q.T
steep_roots = torch.linalg.eigvalsh(steep.T @ steep).flip(0)[:4].clamp(min=0).sqrt().tolist()
steep_eigen = steep_roots[3]
print("true singular values 1, 1e-2, 1e-4, 1e-6, all in float32:")
for name, values in {"SVD": torch.linalg.svdvals(steep)[:4].tolist(), "roots of eigenvalues": steep_roots}.items():
    print(f"   {name:22}" + "".join(f"{v:10.1e}" for v in values))

# %% [markdown]
# ### How small is zero?
#
# Multiply a random $512 \times 16$ matrix by a random $16 \times 512$ one. The product has rank 16, on paper. How
# many of its 512 singular values does the computer find to be exactly 0? Guess, then run.

# %%
rng = torch.Generator().manual_seed(3)
left, right = torch.randn(512, 16, generator=rng, dtype=torch.float64), torch.randn(16, 512, generator=rng, dtype=torch.float64)
products = {"float64": left @ right, "float32": left.float() @ right.float()}
products["bfloat16"] = products["float32"].bfloat16().float()
spectra = {name: torch.linalg.svdvals(P) for name, P in products.items()}
exact_zeros = {name: int((S == 0).sum()) for name, S in spectra.items()}
relative_tolerance = {name: 512 * torch.finfo(getattr(torch, name)).eps for name in ("float64", "float32")}
numerical = {name: library_rank(P) for name, P in products.items()}
show(pictures.spectra_figure({k: S.tolist() for k, S in spectra.items()}, relative_tolerance, ylim=(1e-18, 5)),
     alt="Singular values on a logarithmic axis. In all three the first 16 are large. Then float64 falls to 1e-16, float32 to 1e-7, "
     "bfloat16 to 1e-3 only. Dotted lines mark the tolerances of float64 and float32, which lie between.")
print(f"of 512 singular values exactly zero:  {listed(exact_zeros)}")
print(f"of 512 above numpy's tolerance:       {listed(numerical)}")

# %% [markdown]
# *The 16 stand out, and below them lies the noise of rounding, which has full rank. The tolerance has to lie
# between.* numpy's (and torch's) rule for it is
#
# $$\text{count } \sigma_i > \sigma_1 \cdot \max(m, n) \cdot \varepsilon ,$$
#
# where $\varepsilon$ is the rounding of the number type, the step from 1 to the next number: $2.2 \cdot 10^{-16}$ for
# float64, $1.2 \cdot 10^{-7}$ for float32 (`torch.finfo(dtype).eps`). It grows with $\sigma_1$, so that multiplying the matrix by a number changes nothing, and with the size,
# because rounding errors add up.
#
# It also has to know where the numbers come from. The bfloat16 matrix above, read as float32, has a rank in the
# hundreds to this rule: its noise is far above float32's rounding. Source 003 says that the rank is the number of
# non-zero singular values. True on paper, never in a computer.

# %% [markdown] exercise="matrix-rank"
# Write `matrix_rank(A, tol=None)`: how many singular values of the tensor `A` `[m, n]` are larger than `tol`. If
# `tol` is `None`, take numpy's rule, with the $\varepsilon$ of `A`'s own dtype. A `tol` that is given counts as it
# is, also if it is 0. Return a whole number.
#
# *Why it matters:* you will read "this adapter has rank 8" in many places, and can check it in one line.

# %% exercise="matrix-rank"
def matrix_rank(A, tol=None) -> int:
    """How many singular values of A [m, n] are larger than tol; by default S.max() · max(m, n) · ε."""
    ### BEGIN SOLUTION
    S = torch.linalg.svdvals(A)
    if tol is None:
        tol = S.max() * max(A.shape) * torch.finfo(A.dtype).eps
    return int((S > tol).sum())
    ### END SOLUTION

# %% check="matrix-rank"
check("matrix-rank", matrix_rank)

# %% [markdown] hint="matrix-rank" level="nudge"
# `torch.linalg.svdvals(A)` gives the singular values, largest first. Then it is counting.

# %% [markdown] hint="matrix-rank" level="shape"
# `torch.finfo(A.dtype).eps` is $\varepsilon$. `(S > tol)` is a tensor of True and False, and `.sum()` counts the True
# ones.

# %% [markdown] hint="matrix-rank" level="code"
# ```python
# S = torch.linalg.svdvals(A)
# if tol is None:
#     tol = S.max() * ... * torch.finfo(...).eps
# return int((S > ...).sum())
# ```

# %% question="rank-q-tolerance"

# %% [markdown]
# ### The best that rank $k$ can do
#
# Keep the first $k$ terms of the SVD, drop the rest. Is there a better matrix of rank $k$? No. **Eckart and Young**
# showed in 1936: of all matrices of rank $k$ this one is nearest to $W$, at the distance
#
# $$\lVert W - W_k \rVert_F = \sqrt{\sigma_{k+1}^2 + \sigma_{k+2}^2 + \dots}$$
#
# ($\lVert\cdot\rVert_F$, the Frobenius norm, is the root of the sum of all squared entries.) So the singular values
# say beforehand what a cut costs. Let others try to do better:

# %%
rng = torch.Generator().manual_seed(4)
M = torch.randn(30, 40, generator=rng) @ torch.diag(0.85 ** torch.arange(40.0)) @ torch.randn(40, 40, generator=rng)
U, S, Vh = torch.linalg.svd(M, full_matrices=False)
k = 5
promised = S[k:].norm().item()
svd_distance = (M - (U[:, :k] * S[:k]) @ Vh[:k]).norm().item()


def best_within(columns):
    """The distance from M to the best matrix whose columns are combinations of these."""
    Q = torch.linalg.qr(columns).Q
    return (M - Q @ (Q.T @ M)).norm().item()


def best_of_100(draw):
    return min(best_within(draw()) for _ in range(100))


rivals = {"k columns of M": best_of_100(lambda: M[:, torch.randperm(40, generator=rng)[:k]]),
          "k random mixtures of its columns": best_of_100(lambda: M @ torch.randn(40, k, generator=rng)),
          "the SVD's directions, shaken by 5 %":
              best_of_100(lambda: U[:, :k] + 0.05 * torch.randn(30, k, generator=rng) / 30**0.5)}
factors = [torch.randn(30, k, generator=rng).requires_grad_(), torch.randn(k, 40, generator=rng).requires_grad_()]
adam = torch.optim.Adam(factors, lr=0.05)
for step in range(400):
    adam.zero_grad()
    (factors[0] @ factors[1] - M).square().sum().backward()
    adam.step()
rivals["two factors, trained by Adam for 400 steps"] = (factors[0] @ factors[1] - M).norm().item()
print(f"promised by the formula {promised:.4f}, reached by the SVD {svd_distance:.4f}")
for name, distance in rivals.items():
    print(f"   {distance / promised:.4f} × that: {name}" + (", best of 100" if "Adam" not in name else ""))
never_beaten = min(rivals.values()) >= promised * (1 - 1e-5)

# %% [markdown]
# Nobody gets below it. (Gradient descent on two factors comes close by itself: LoRA's $B$ and $A$ are trained, and
# nobody computes an SVD.)

# %% [markdown] exercise="low-rank-approx"
# Write `low_rank(W, k)`: return `(B, A)`, `[m, k]` and `[k, n]`, such that `B @ A` is the matrix of rank $k$ nearest
# to `W` `[m, n]`. How you share the singular values between the factors is up to you.
#
# *Why it matters:* it makes an adapter out of any change of a weight, and it is how some methods (PiSSA, LoftQ)
# choose where an adapter starts.

# %% exercise="low-rank-approx"
def low_rank(W, k: int):
    """(B [m, k], A [k, n]) with B @ A the nearest matrix of rank k."""
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:k].sqrt()
    return U[:, :k] * root, root[:, None] * Vh[:k]
    ### END SOLUTION

# %% check="low-rank-approx"
check("low-rank-approx", low_rank)

# %% [markdown] hint="low-rank-approx" level="nudge"
# `U, S, Vh = torch.linalg.svd(W, full_matrices=False)`. Keep $k$ columns of `U`, $k$ singular values, and $k$ rows of
# `Vh`.

# %% [markdown] hint="low-rank-approx" level="shape"
# `U[:, :k] * S[:k]` multiplies each column by its singular value: that is a good $B$, `[m, k]`. Then $A$ is `Vh[:k]`,
# `[k, n]`.

# %% [markdown] hint="low-rank-approx" level="code"
# ```python
# U, S, Vh = torch.linalg.svd(W, full_matrices=False)
# return U[:, ...] * ..., Vh[...]
# ```

# %% question="rank-q-eckart"

# %% [markdown]
# ## What it saves
#
# Source 000 takes a matrix of $512 \times 1024$. By hand: it has $512 \cdot 1024 = 524{,}288$ numbers. As a product
# of $512 \times 50$ and $50 \times 1024$: $25{,}600 + 51{,}200 = 76{,}800$, which is 14.6 % of that.

# %% [markdown] exercise="rank-budget"
# Write `rank_budget(m, n, budget)`: return `(k, saved)`. `k` is the largest rank whose two factors, $m \times k$ and
# $k \times n$, have together at most `budget` numbers (no rank is larger than $m$ or $n$; 0 if not even rank 1 fits).
# `saved` is how many numbers that saves against the full $m \times n$ matrix, and may be negative.
#
# *Why it matters:* adapters are chosen this way round, from what one can afford.

# %% exercise="rank-budget"
def rank_budget(m: int, n: int, budget: int):
    """(k, saved): the largest rank within the budget, and the numbers saved against the full matrix."""
    ### BEGIN SOLUTION
    k = min(budget // (m + n), m, n)
    return k, m * n - k * (m + n)
    ### END SOLUTION

# %% check="rank-budget"
check("rank-budget", rank_budget)

# %% [markdown] hint="rank-budget" level="nudge"
# What does one more rank cost? One more column of $B$ and one more row of $A$.

# %% [markdown] hint="rank-budget" level="shape"
# Rank $k$ costs $k\,(m + n)$. The largest whole $k$ with $k\,(m+n) \le$ `budget` comes from `//`. Check with 000's:
# `rank_budget(512, 1024, 76_800)` is `(50, 447_488)`.

# %% [markdown] hint="rank-budget" level="code"
# ```python
# k = min(budget // ..., m, n)
# return k, m * n - ...
# ```

# %% [markdown]
# The slide then writes $W^T \approx AB$ with these factors. **Does it hold?** That depends on $W$. Three of the same
# size: random numbers; a matrix that *has* rank 50, with a little noise; and real weights of the bundled model, four
# of them side by side. Predict the error of each at $k = 50$.

# %%
from pefttools.lab import (collate, encoded, generate, held_out_loss, load_base, load_data, loss_sum, prompt_of, steps, train)

model, tokenizer = load_base("tiny")
weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name}

rng = torch.Generator().manual_seed(5)
noise = torch.randn(512, 1024, generator=rng)
true_50 = torch.randn(512, 50, generator=rng) @ torch.randn(50, 1024, generator=rng) / 50**0.5
true_50 += 0.05 * torch.randn(512, 1024, generator=rng)
real = torch.cat([weights[f"model.layers.{layer}.mlp.{kind}.weight"][:512]
                  for layer in (2, 3) for kind in ("gate_proj", "up_proj")], dim=1)
factor_numbers = 512 * 50 + 50 * 1024
lost = {}
for name, M in {"random numbers": noise, "rank 50 and a little noise": true_50, "real weights": real}.items():
    S = torch.linalg.svdvals(M)
    lost[name] = (S[50:].norm() / S.norm()).item()
print(f"{factor_numbers:,} of {512 * 1024:,} numbers ({factor_numbers / (512 * 1024):.1%}), saved {512 * 1024 - factor_numbers:,}")
print(f"relative error at k = 50: {listed(lost, '.0%')}")

# %% [markdown]
# The count is right, the $\approx$ is not, for a weight: rank 50 holds of real weights hardly more than of random numbers.
# It was meant for the *change* of a weight, $\Delta W$, and
# everything depends on that difference. So let us look at real ones.

# %% [markdown]
# ## Real spectra
#
# One number for a whole spectrum would help. The **effective rank** (Roy and Vetterli 2007) asks how many *equal*
# directions would be as spread out as these are. With shares $p_i = \sigma_i / (\sigma_1 + \sigma_2 + \dots)$:
#
# $$\operatorname{erank}(W) = \exp\Bigl(-\sum_i p_i \ln p_i\Bigr).$$
#
# The sum with its minus sign is the entropy of the shares; $k$ equal values have the entropy $\ln k$, hence the
# $\exp$. By hand, for 4, 2, 1, 1: the shares are $\frac12, \frac14, \frac18, \frac18$. Their entropy is
#
# $$\tfrac12 \ln 2 + \tfrac14 \ln 4 + 2 \cdot \tfrac18 \ln 8 = \tfrac74 \ln 2 ,$$
#
# and the effective rank $2^{7/4} = 3.36$: rank 4, but not quite four directions' worth.

# %% [markdown] exercise="effective-rank"
# Write `effective_rank(A)` for a tensor `A` `[m, n]` (not all zero); return a number. A singular value of exactly 0
# contributes nothing ($0 \cdot \ln 0$ counts as 0).
#
# *Why it matters:* it tells a flat spectrum from a steep one without anybody having to choose a tolerance.

# %% exercise="effective-rank"
def effective_rank(A) -> float:
    """exp of the entropy of the singular values' shares."""
    ### BEGIN SOLUTION
    p = torch.linalg.svdvals(A)
    p = p[p > 0] / p.sum()
    return torch.exp(-(p * p.log()).sum()).item()
    ### END SOLUTION

# %% check="effective-rank"
check("effective-rank", effective_rank)

# %% [markdown] hint="effective-rank" level="nudge"
# Three steps: singular values, shares, entropy. And what does your code do with `0 * log(0)`?

# %% [markdown] hint="effective-rank" level="shape"
# `p = S / S.sum()`; leave out the zeros with `p[p > 0]`. The result for the diagonal matrix with 4, 2, 1, 1 is 3.36.

# %% [markdown] hint="effective-rank" level="code"
# ```python
# S = torch.linalg.svdvals(A)
# p = S[S > 0] / ...
# return torch.exp(-(p * ...).sum()).item()
# ```

# %% [markdown]
# Now the bundled model, which has really been pretrained. Beside each kind of weight, a matrix of random numbers of
# the same size:

# %%
kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def measured(matrices: dict) -> tuple[dict, dict, dict]:
    """Of matrices by name: {kind: the numerical ranks that occur, as a text}, and of each kind the means over the layers of
    the effective rank and of the share of the energy Σσ² that the first 8 directions hold."""
    found = {kind: [] for kind in kinds}
    for name, M in matrices.items():
        S = torch.linalg.svdvals(M)                            # once, for all three
        tol = S[0] * max(M.shape) * torch.finfo(M.dtype).eps
        found[name.split(".")[-2]].append((int((S > tol).sum()), torch.special.entr(S / S.sum()).sum().exp().item(), energy_in(S)))
    ranks, eranks, heads = ({kind: [three[i] for three in values] for kind, values in found.items()} for i in range(3))
    return ({kind: ", ".join(map(str, sorted(set(values)))) for kind, values in ranks.items()},
            *({kind: sum(values) / len(values) for kind, values in each.items()} for each in (eranks, heads)))


def energy_in(S, k: int = 8) -> float:
    """Share of the energy Σσ² that the first k of the singular values hold."""
    return (S[:k].square().sum() / S.square().sum()).item()


def table(rows: list) -> None:
    display(Markdown("\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)))


rng = torch.Generator().manual_seed(6)
random_ones = {name: torch.randn(W.shape, generator=rng) for name, W in weights.items()}
base_ranks, base_erank, base_head = measured(weights)
_, random_erank, random_head = measured(random_ones)
shape = {kind: " × ".join(map(str, next(W.shape for name, W in weights.items() if f".{kind}." in name))) for kind in kinds}
table([("", *(f"`{kind}`" for kind in kinds)), ("---",) * 8,
       ("size", *shape.values()),
       ("rank", *base_ranks.values()),
       ("effective rank", *(f"{v:.0f}" for v in base_erank.values())),
       ("… of random numbers", *(f"{v:.0f}" for v in random_erank.values())),
       ("energy in the first 8", *(f"{v:.0%}" for v in base_head.values())),
       ("… of random numbers", *(f"{v:.0%}" for v in random_head.values()))])
full_rank = all(base_ranks[kind] == str(min(next(W.shape for name, W in weights.items() if f".{kind}." in name))) for kind in kinds)
print("every weight matrix has full rank:", full_rank)

# %% [markdown]
# (Mean over the six layers. *Energy* is the share of $\sum\sigma_i^2$.) Every pretrained weight has **full rank**.
# Nothing in it is redundant in the strict sense; its spectrum is a little steeper than that of random numbers, and
# there is no edge where one could cut.
#
# ### The change that fine-tuning makes
#
# Now fine-tune the same model, every number of every linear layer, without any trick. What is the rank of $\Delta W =
# W_{\text{after}} - W_{\text{before}}$? **Predict:** higher, lower, or the same as that of $W$?

# %%
train_rows = encoded(load_data("train"), tokenizer)
held_out = load_data("held_out").shuffle(seed=0).select(range(steps(64, quick=16)))
asked = [held_out[i] for i in range(2)]
loss_base = held_out_loss(model, tokenizer, held_out)
said_before = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=40)

tuned = copy.deepcopy(model)
for name, p in tuned.named_parameters():
    p.requires_grad_(name in weights)                        # all linear layers, whole; embedding and norms rest
length = steps(full=60, quick=3)
history = train(tuned, train_rows, tokenizer, steps=length, lr=1e-3, batch_size=8, seed=0)
loss_tuned = held_out_loss(tuned, tokenizer, held_out)
deltas = {name: p.detach() - weights[name] for name, p in tuned.named_parameters() if name in weights}

# %%
show(history.plot("All linear layers, fully fine-tuned"), alt="Training loss of every step in grey and its running mean in blue, falling "
     "steeply at first.")
print(f"held-out loss: {loss_base:.2f} before, {loss_tuned:.2f} after {length} steps of 8 rows")
said_after = generate(tuned, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=40)
for row, before, after in zip(asked, said_before, said_after):
    print("─" * 90 + "\n" + prompt_of(row).strip())
    for label, text in (("before", before), ("after", after)):
        print(f"  [{label}]\n" + "\n".join("    " + line for line in text.strip().splitlines()[:5]))

# %% [markdown]
# (It has learned the form of an answer by now, and hardly the content: the run is short.) And its $\Delta W$:

# %%
delta_ranks, delta_erank, delta_head = measured(deltas)
spectra = {}
for what, matrices in {"random numbers": random_ones, "W before (up_proj)": weights, "ΔW (up_proj)": deltas}.items():
    of_layers = [torch.linalg.svdvals(M) for name, M in matrices.items() if ".up_proj." in name]
    spectra[what] = (sum(S / S[0] for S in of_layers) / len(of_layers)).tolist()
show(pictures.spectra_figure(spectra, ylim=(5e-3, 1.5)), alt="Singular values relative to the largest, on a logarithmic axis. "
     "Those of random numbers fall slowly, those of W a little faster, those of Delta W by far the fastest within the first dozen.")
table([("", *(f"`{kind}`" for kind in kinds)), ("---",) * 8,
       ("rank of $\\Delta W$", *delta_ranks.values()),
       ("effective rank of $W$", *(f"{v:.0f}" for v in base_erank.values())),
       ("effective rank of $\\Delta W$", *(f"{v:.0f}" for v in delta_erank.values())),
       ("energy in the first 8, $W$", *(f"{v:.0%}" for v in base_head.values())),
       ("energy in the first 8, $\\Delta W$", *(f"{v:.0%}" for v in delta_head.values()))])

# %% [markdown]
# So $\Delta W$ is **not** of low rank, taken literally: Adam moves every number a little, and rounding alone would
# fill up the rest. What it has is a *head*, a few directions that hold about half of its energy, and a long flat
# tail. Does the tail matter?
#
# ### Cut it, and see
#
# The fair question is what the model loses. We keep $k$ directions of $\Delta W$ in every linear layer, put $W_0 +
# \Delta W_k$ back, and measure the held-out loss. And for comparison we do the same to the weight itself, $(W_0 +
# \Delta W)_k$. Where is the edge? Guess both.

# %%
cut_svd = {what: {name: torch.linalg.svd(M, full_matrices=False) for name, M in matrices.items()}
           for what, matrices in {"ΔW": deltas, "W": {name: weights[name] + deltas[name] for name in weights}}.items()}


@torch.no_grad()
def loss_when_cut(what: str, k: int) -> float:
    """Held-out loss with rank k kept in every linear layer of ΔW (the base weight stays whole), or of W itself."""
    for name, p in tuned.named_parameters():
        if name in weights:
            U, S, Vh = cut_svd[what][name]
            p.copy_((U[:, :k] * S[:k]) @ Vh[:k] + (weights[name] if what == "ΔW" else 0))
    return held_out_loss(tuned, tokenizer, held_out)


cut_at = {"ΔW": [1, 2, 4, 8, 16, 32, 128], "W": [1, 8, 32, 128]} if steps(1, quick=0) else {"ΔW": [2, 32], "W": [2, 32]}
cut = {"rank k of ΔW, on top of the whole W₀": [(k, loss_when_cut("ΔW", k)) for k in cut_at["ΔW"]],
       "rank k of the weight W₀ + ΔW itself": [(k, loss_when_cut("W", k)) for k in cut_at["W"]]}
of_delta, of_weight = (dict(points) for points in cut.values())
gained = {k: (loss_base - loss) / (loss_base - loss_tuned) for k, loss in of_delta.items()}
show(pictures.truncation_figure(cut, loss_base, loss_tuned), alt="Held-out loss against the rank kept. Delta W cut to rank k: " +
     ", ".join(f"{k}: {v:.2f}" for k, v in of_delta.items()) + ". The weight itself cut to rank k: " +
     ", ".join(f"{k}: {v:.2f}" for k, v in of_weight.items()) + f". Base model {loss_base:.2f}, uncut {loss_tuned:.2f}.")

# %%
share_8 = gained[min(gained, key=lambda k: abs(k - 8))]
most = max(of_weight)
display(Markdown(
    "*Share of the fine-tuning's gain that is left when $\\Delta W$ is cut: "
    + ", ".join(f"$k = {k}$: {v:.0%}" for k, v in gained.items())
    + f". The weight itself, cut to {most} of 256 directions, has a loss of {of_weight[most]:.2f}, where the untouched base "
    f"model has {loss_base:.2f} and the uncut fine-tuned one {loss_tuned:.2f}.*"))

# %% [markdown]
# (At $k = 128$ the matrices of `k_proj` and `v_proj`, which have no more than 128 directions, are whole.)
#
# That is the bet of LoRA in one picture. **The weights need all their directions; what fine-tuning adds needs a
# few.** (Nobody told this run to stay low. LoRA trains within rank $r$ from the beginning, and can use its few
# directions better than a cut afterwards can.)

# %% question="rank-q-which"

# %% [markdown]
# The same as pictures of the matrices themselves, a weight and below it its change, each with the nearest matrix of
# rank 8:

# %%
o_proj = "model.layers.3.self_attn.o_proj.weight"
for name, M in {"weight": weights[o_proj], "its ΔW": deltas[o_proj]}.items():
    show(pictures.svd_figure(M, 8, name), alt=pictures.svd_alt(M, 8, name))

# %% [markdown]
# *The weight looks like noise (the dark band is one attention head's 64 columns), and rank 8 hardly resembles it. In
# $\Delta W$ there are stripes, whole rows and columns that move together: that is what a low rank looks like.* Now move $k$
# yourself. At which $k$ do you stop seeing a difference?

# %%
pictures.svd_explorer({"picture": image, "weight (layer 3, o_proj)": weights[o_proj], "its ΔW": deltas[o_proj],
                       "random numbers": torch.randn(256, 256, generator=torch.Generator().manual_seed(8))}, images=("picture",));

# %% [markdown]
# *Of the picture a few directions hold nearly everything. Of random numbers none is worth more than the next. The
# weight is nearly like the latter; its change lies in between.*
#
# ## Intrinsic dimension
#
# Rank looks at one matrix at a time. Now take all of the model's $D$ parameters as one long vector $\theta$. Training
# starts at $\theta_0$ and may move in $D$ directions. Does it need them all? Li et al. (2018) asked it this way: draw
# $d$ random directions, **before looking at any data**, and allow training to move along these only:
#
# $$\theta = \theta_0 + P\,v, \qquad P\colon D \times d \text{ random and fixed}, \qquad v\colon d \text{ numbers, trained, zero at the start}.$$
#
# If it still learns, the good models cannot be a needle in a haystack: they must lie around $\theta_0$ in nearly
# every direction. The smallest $d$ that reaches 90 % of what training all of $\theta$ reaches is called $d_{90}$, the
# **intrinsic dimension** of the task (with this model, from this start).
#
# A case where the answer is known (theirs): $D = 1000$ parameters; the loss asks that the first hundred add up to 1,
# the second hundred to 2, and so on up to 10. These are **ten** demands. So $d = 10$ random directions should
# suffice, and 9 not:

# %%
demands = torch.block_diag(*[torch.ones(1, 100, dtype=torch.float64)] * 10)             # [10, 1000]
wanted = torch.arange(1.0, 11.0, dtype=torch.float64)
directions = torch.linalg.qr(torch.randn(1000, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
toy = {}
for d in (2, 5, 8, 9, 10, 11, 20):
    P = directions[:, :d]
    v = torch.linalg.lstsq(demands @ P, wanted).solution                                  # the best v, no training needed
    toy[d] = (demands @ P @ v - wanted).square().mean().item()
print("loss at the best v:", ", ".join(f"d = {d}: {loss:.2g}" for d, loss in toy.items()))

# %% [markdown] exercise="intrinsic-dimension"
# Write `train_in_subspace(loss, theta0, P, steps, lr)`: plain gradient descent on $v$.
#
# | argument | what it is |
# |---|---|
# | `loss` | a function of $\theta$ `[D]`; gives a number that can be differentiated |
# | `theta0`, `P` | `[D]` and `[D, d]`; both stay as they are |
# | `steps`, `lr` | how many steps $v \leftarrow v - \text{lr} \cdot \partial L / \partial v$, and how long |
# | *returns* | $v$ after the last step, `[d]` |
#
# *Why it matters:* it is the experiment that made people believe in small updates. And it is five lines.

# %% exercise="intrinsic-dimension"
def train_in_subspace(loss, theta0, P, steps: int, lr: float):
    """v [d] after `steps` steps of gradient descent on loss(theta0 + P v), from v = 0."""
    ### BEGIN SOLUTION
    v = torch.zeros(P.shape[1], requires_grad=True)
    for _ in range(steps):
        gradient, = torch.autograd.grad(loss(theta0 + P @ v), v)
        with torch.no_grad():
            v -= lr * gradient
    return v.detach()
    ### END SOLUTION

# %% check="intrinsic-dimension"
check("intrinsic-dimension", train_in_subspace)

# %% [markdown] hint="intrinsic-dimension" level="nudge"
# What trains is `v` and nothing else. Build $\theta$ from it anew in every step, so that the gradient can find its
# way back to `v`.

# %% [markdown] hint="intrinsic-dimension" level="shape"
# `v = torch.zeros(P.shape[1], requires_grad=True)`. In each step: `loss(theta0 + P @ v)`, its gradient with respect
# to `v` (`torch.autograd.grad`, or `backward()` and `v.grad`; then do not forget to clear it), and a step under
# `torch.no_grad()`. `torch.optim.SGD([v], lr=lr)` is fine too.

# %% [markdown] hint="intrinsic-dimension" level="code"
# ```python
# v = torch.zeros(..., requires_grad=True)
# for _ in range(steps):
#     gradient, = torch.autograd.grad(loss(theta0 + ...), v)
#     with torch.no_grad():
#         v -= ...
# return v.detach()
# ```

# %% [markdown]
# ### Whose gradients are zero?
#
# Source 000 gives a reason why few directions suffice: only a small number of them matter, and "the rest have
# near-zero gradients". If it were so, a *random* direction would be useless: it points almost entirely into the rest.
# Look at the gradients of the real model on one batch:

# %%
batch = collate([train_rows[i] for i in range(16)], tokenizer.pad_token_id)
model.requires_grad_(True)
(loss_sum(model, batch) / int((batch["labels"][:, 1:] != -100).sum())).backward()
grads = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
linear = torch.cat([grads[name].flatten() for name in weights])
typical = linear.square().mean().sqrt()
near_zero = (linear.abs() < 0.01 * typical).float().mean().item()
shares = linear.square().sort(descending=True).values.cumsum(0) / linear.square().sum()
half = (int((shares < 0.5).sum()) + 1) / len(linear)
gradient_energy = sum(energy_in(torch.linalg.svdvals(grads[name])) for name in weights) / len(weights)
print(f"linear layers: {near_zero:.1%} of the gradient's entries are below a hundredth of its typical size;")
print(f"   half of its energy is in {half:.1%} of the entries")
print(f"as matrices: the first 8 directions of a layer's gradient hold {gradient_energy:.0%} of its energy")

# %% [markdown]
# Some parameters have far larger gradients than others, that much is true: a few in a thousand hold half of the energy. But
# the rest are not near zero. They hold the other half, fewer than one in twenty is below a hundredth of the typical
# size, and a random direction, which listens to all of them, finds something to follow. What *is* small is the number
# of directions **of each matrix**: gradients are steep as matrices, which is the picture of $\Delta W$ above. "Few
# directions" and "few parameters" are different things.
#
# ### Measured on the bundled model
#
# A dense $P$ for $D$ = 5.5 million and $d$ = 10,000 would have 55 billion numbers. The library
# (`pefttools/intrinsic.py`) draws a $P$ with a single $\pm1/\sqrt c$ in each row instead ($c$: how many rows share a
# column): every parameter listens to one of the $d$ coordinates, with a random sign. Its columns are at right angles
# and of length 1, as with a dense one, and it costs one look-up.
#
# A short run here, with four ways to move the model for the same steps on the same data:

# %%
from pefttools import inject as adapters
from pefttools.intrinsic import IntrinsicConfig
from pefttools.intrinsic import d90 as library_d90
from pefttools.lab.intrinsic_dimension import learning_rate, read

D = sum(p.numel() for p in model.parameters())
short = steps(full=25, quick=2)
losses_here = {}
for d in (300, 3_000, 30_000):
    adapters.attach(model, IntrinsicConfig(d=d, seed=0))
    assert adapters.count_parameters(model)[0] == d
    train(model, train_rows, tokenizer, steps=short, lr=learning_rate(d, D), batch_size=8, seed=0)
    losses_here[d] = held_out_loss(model, tokenizer, held_out)
    adapters.detach(model)
same_again = held_out_loss(model, tokenizer, held_out) == loss_base      # detached: bit for bit the base model
everything = copy.deepcopy(model).requires_grad_(True)
train(everything, train_rows, tokenizer, steps=short, lr=learning_rate(0, D), batch_size=8, seed=0)
losses_here[D] = held_out_loss(everything, tokenizer, held_out)
shares_here = {d: (loss_base - loss) / (loss_base - losses_here[D]) for d, loss in losses_here.items()}
print(f"held-out loss of the base model {loss_base:.2f}; after {short} steps")
for d, loss in losses_here.items():
    print(f"   {f'd = {d:,}' if d < D else f'all {d:,} parameters':24} {loss:.2f}")

# %% [markdown]
# Now with care: several seeds, more steps, more dimensions. That takes long, so it was run ahead, by `python -m
# pefttools.lab.intrinsic_dimension`. A seed draws $P$ and the order of the data. The learning rate is chosen so that
# in one step each parameter moves a fixed factor times as far as in full fine-tuning; the factor was chosen on
# training rows that were kept out. ± is the standard error of the mean over the seeds.

# %%
results = read()
shares = pictures.learned(results)
pairs = [(run["d"], run["loss"]) for run in results["runs"] if run["d"] and "name" not in run]
full_losses = [run["loss"] for run in results["runs"] if run["d"] == 0]
full_loss = sum(full_losses) / len(full_losses)
print("loss for some factors, on rows kept out:")
for d in sorted({run["d"] for run in results["tuned"]}):
    tried = ", ".join(f"{run['factor']:g}: {run['loss']:.3f}" for run in results["tuned"] if run["d"] == d)
    print(f"   {f'd = {d:,}' if d else 'all parameters':15} {tried}  → taken: {results['factor'] if d else 1:g}")
print(f"{results['steps']} steps of {results['batch']} rows. Held-out loss {results['before']:.2f} before; after full fine-tuning of "
      f"{results['D']:,}\nparameters {full_loss:.3f} (seeds: {', '.join(f'{v:.3f}' for v in full_losses)})")
rows = [("$d$", "share of $D$", "held-out loss, each seed", "share of full fine-tuning's gain"), ("---",) * 4]
for d, s in shares.items():
    if d:
        each = ", ".join(f"{loss:.3f}" for e, loss in pairs if e == d)
        rows.append((f"{d:,}", f"{d / results['D']:.3%}", each, f"{sum(s) / len(s):.1%} ± {pictures.standard_error(s):.1%}"))
table(rows)

# %% [markdown] exercise="d90"
# Write `d90(runs, before, full)`: the smallest $d$ at which the **mean** loss over its seeds has come at least 90 %
# of the way from `before` down to `full`; `None` if no $d$ has.
#
# | argument | what it is |
# |---|---|
# | `runs` | a list of `(d, loss)`, in no particular order, one for each seed |
# | `before`, `full` | the loss of the untouched model, and that of full fine-tuning |
#
# *Why it matters:* papers report one number, and much hides in how it is read off.

# %% exercise="d90"
def d90(runs, before: float, full: float):
    """The smallest d whose mean loss is 90 % of the way from `before` to `full`, or None."""
    ### BEGIN SOLUTION
    losses = {}
    for d, loss in runs:
        losses.setdefault(d, []).append(loss)
    target = before - 0.9 * (before - full)
    return min((d for d, seen in losses.items() if sum(seen) / len(seen) <= target), default=None)
    ### END SOLUTION

# %% check="d90"
check("d90", d90)

# %% [markdown] hint="d90" level="nudge"
# Which loss has to be reached? Work it out for `before = 3`, `full = 1`: the way is 2 long.

# %% [markdown] hint="d90" level="shape"
# The target is `before - 0.9 * (before - full)`. Collect the losses of each $d$ in a dict of lists, average, and take
# the smallest $d$ at or below the target.

# %% [markdown] hint="d90" level="code"
# ```python
# of = {}                                  # d → its losses
# for d, loss in runs:
#     of.setdefault(d, []).append(...)
# reached = [d for d, seen in of.items() if sum(seen) / len(seen) <= ...]
# return min(..., default=None)
# ```

# %%
measured_d90 = library_d90(pairs, full_loss, results["before"])
by_name = {}
for run in results["runs"]:
    if "name" in run:
        by_name.setdefault((run["name"], run["d"]), []).append((results["before"] - run["loss"]) / (results["before"] - full_loss))
lora_points = [(size, sum(s) / len(s), name) for (name, size), s in by_name.items()]
mean_share = {d: sum(s) / len(s) for d, s in shares.items() if d}
short_run = {d: share for d, share in shares_here.items() if d < D}


def said(d) -> str:
    return f"{d:,}" if d else "not reached"


show(pictures.intrinsic_figure(shares, measured_d90, results["D"], short_run, lora_points),
     alt="Share of full fine-tuning's gain against d on a logarithmic axis, rising: "
     + ", ".join(f"{d:,}: {share:.0%}" for d, share in mean_share.items()) + f". d90 is {said(measured_d90)}. "
     + " ".join(f"{name} with {size:,} parameters: {share:.0%}." for size, share, name in lora_points))
display(Markdown(
    f"*$d_{{90}}$ = **{said(measured_d90)}** of {results['D']:,}" + (f" ({measured_d90 / results['D']:.2%})" if measured_d90 else "") + ". "
    f"With $d$ = 3,000, which is {3000 / results['D']:.3%} of the directions, random ones, {mean_share[3000]:.0%} of the gain is there. "
    + " ".join(f"{name} trains {size:,} numbers and gets {share:.0%}." for size, share, name in lora_points) + "*"))

# %% [markdown]
# What to make of it:
#
# - A small share of random directions does most of the work, and the curve rises slowly, by the logarithm of $d$.
#   There is no edge at which it suddenly works.
# - The number is not a constant of nature. It belongs to this model, this task, these steps, and this way of reading
#   it off; on a grid of $d$ it is an upper bound. Source 001 says that it is "measured in hundreds". That is
#   RoBERTa-large's: about 200 of 355 million on MRPC, a yes-or-no task, in Aghajanyan et al. (2020), who also find
#   that *larger* models need *less*. Ours is small and has to write programs.
# - LoRA's points (diamonds; its learning rate was not tuned) do not lie above the curve. So its directions are, per
#   number, no better here than random ones. What it has over them is the price: $P v$ moves all $D$ parameters, and
#   needs the gradient of every one to find the gradient of $v$. $B$ and $A$ never touch the rest.
#
# And what it does **not** say: that $\Delta W$ has a low rank. Look at what a single random direction does to a
# matrix:

# %%
adapters.attach(model, IntrinsicConfig(d=1, seed=0))
with torch.no_grad():
    model.intrinsic.vector.fill_(1.0)
moved = model.model.layers[3].self_attn.o_proj.weight.detach() - weights[o_proj]
adapters.detach(model)
rank_moved, erank_moved = library_rank(moved), library_effective_rank(moved)
print(f"d = 1: the change of a 256 × 256 weight has rank {rank_moved}, effective rank {erank_moved:.0f}")

# %% question="rank-q-not-rank"

# %% question="rank-q-d90"

# %% [markdown]
# ## Against production
#
# numpy and torch have the rank, and the same answers (tall matrices and wide ones, and with a tolerance of your own).
# The cell stops if one differs:

# %%
rng = torch.Generator().manual_seed(9)
tried = 0
for _ in range(60):
    m, n, k = (int(torch.randint(1, 40, (), generator=rng)) for _ in range(3))
    M = torch.randn(m, k, generator=rng) @ torch.randn(k, n, generator=rng) * 10.0 ** float(torch.randint(-6, 7, (), generator=rng))
    answers = {library_rank(M), int(torch.linalg.matrix_rank(M)), int(np.linalg.matrix_rank(M.numpy()))}
    tol = 0.3 * torch.linalg.matrix_norm(M, 2).item()
    answers_tol = {library_rank(M, tol), int(torch.linalg.matrix_rank(M, atol=tol, rtol=0.0)),
                   int(np.linalg.matrix_rank(M.numpy(), tol=tol))}
    assert len(answers) == len(answers_tol) == 1, (m, n, k, answers, answers_tol)
    tried += 1
print(f"library, torch and numpy agree on {tried} matrices, with the default tolerance and with one of 0.3 σ₁")

# %% [markdown]
# PEFT uses the SVD in several places. **PiSSA** (`init_lora_weights="pissa"`) starts an adapter with the first $r$
# directions of the weight itself, and takes them out of the frozen part. So its $\frac{\alpha}{r}BA$ must be our
# `low_rank(W, r)`, and what is left must be $W$ without it:

# %%
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)     # peft imports it, and it complains about missing extras
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

    holder = nn.ModuleDict({"layer": nn.Linear(256, 256, bias=False)})
    W = weights[o_proj]
    with torch.no_grad():
        holder["layer"].weight.copy_(W)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["layer"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(holder, config).base_model.model["layer"]
B, A = library_low_rank(W, 8)
pissa = theirs.scaling["default"] * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
pissa_error = (pissa - B @ A).abs().max().item()
rest_error_pissa = (theirs.base_layer.weight - (W - B @ A)).abs().max().item()
print(f"α/r·BA of peft against low_rank(W, 8): {pissa_error:.1e};  the frozen rest: {rest_error_pissa:.1e}  "
      f"(entries up to {W.abs().max():.2f})")
assert pissa_error < 1e-5 and rest_error_pissa < 1e-5

# %% [markdown]
# ### Find the line
#
# Here it is in their source. The marked lines are your `low_rank`, with $\sqrt S$ in each factor; the names $V$, $U$
# are the other way round from ours, as the comment there says. Why is $S$ divided by the scaling?

# %%
import peft.tuners.lora.layer as source

lines, first_line = inspect.getsourcelines(source.LoraLayer.pissa_init)
marked = ("torch.linalg.svd(", "Sr /=", "lora_A = torch.diag", "lora_B = Vr")
for number, line in enumerate(textwrap.dedent("".join(lines[8:])).splitlines(), start=first_line + 8):
    print(f"{'→' if any(text in line for text in marked) else ' '} {number:5}  {line}")
print(f"\npeft {peft.__version__}, {source.__name__.replace('.', '/')}.py")

# %% [markdown]
# | the code asks | because |
# |---|---|
# | `if init_lora_weights == "pissa":` | the exact SVD; slow for a matrix with thousands of rows |
# | `svd_lowrank(` | otherwise a random sketch of it (Halko et al. 2011), a few rounds are enough |
# | `Sr /= self.scaling[adapter_name]` | the layer multiplies $BA$ by $\alpha/r$; divided beforehand, the product is $W_r$ itself |
# | `weight.to(torch.float32)` | there is no SVD in 16 bits |
# | `transpose(` | some models (GPT-2) store weights as inputs × outputs |
#
# **Go and look** (nothing to hand in): `numpy.linalg.matrix_rank` is a dozen lines; find the tolerance in it. In
# `torch.svd_lowrank`, which argument says how many rounds?

# %%
print("numpy:", *(line.strip() for line in inspect.getsource(np.linalg.matrix_rank).splitlines() if "finfo(S.dtype)" in line))

# %% [markdown]
# ## The sources say, we measured
#
# The right column is filled in by the code of this notebook.

# %%
from transformers import RobertaConfig, RobertaModel

def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


reached = bool(measured_d90)
if most == 128:
    cut_weight = f"; cut to 128 directions each, the loss is {of_weight[128]:.2f} (uncut {loss_tuned:.2f})"
else:
    cut_weight = ""                                          # a quick run does not go so far
with torch.device("meta"):                                   # RoBERTa-large's shapes, without the numbers
    roberta = sum(p.numel() for p in RobertaModel(RobertaConfig(
        vocab_size=50_265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1)).parameters())

rows = [
    ("source", "it says", "we measured", ""),
    ("---",) * 4,
    ("000", "the 3 × 3 matrix has rank 2, by elimination", f"rank {by_elimination.rank}, the same reduced rows",
     verdict(by_elimination.rank == 2 and slide_agrees)),
    ("000", "count the non-zero rows or columns, whichever is minimum",
     f"right after elimination; before it, {rule_of_the_slide(equal_rows)} for two equal rows",
     verdict(rule_holds, "✓ after, ✗ before")),
    ("000", "100 outputs, rank 10: only 10 are independent",
     f"the outputs have rank {rank_y}; all of them from the first ten to {rest_error:.0e}", verdict(rank_y == 10)),
    ("000", "the other 90 do not influence the decision",
     f"dropped: off by {dropped:.0%}; folded into the ten: {folded:.0e}; behind a ReLU they have rank {rank_relu}",
     verdict(folded < 1e-4, "folded ✓, dropped ✗")),
    ("000", "gradients through the redundant neurons carry nothing new, and updates to them do not help",
     f"the gradient has rank {rank_gradient}, and $W$ after one step; the loss falls to {losses_free[-1]:.1g}, where rank 10 "
     f"cannot get below {floor:.2f}", verdict(rank_gradient <= 10 and losses_free[-1] >= floor)),
    ("003", "rank = number of non-zero singular values",
     f"512 × 512 of rank 16 in float32: {512 - exact_zeros['float32']} are not zero, {numerical['float32']} are above the "
     "tolerance", verdict(512 - exact_zeros["float32"] == numerical["float32"], "✓", "✓ on paper")),
    ("003", "singular values are roots of the eigenvalues of $M^\\top M$",
     f"to {eigen_error:.0e} in float64; in float32, 1e-6 comes out as {steep_eigen:.0e}",
     verdict(eigen_error < 1e-9, "✓, numerically worse")),
    ("003", "over-parametrised weights can be decomposed into smaller ones",
     "every pretrained weight has full rank" + cut_weight, verdict(not full_rank)),
    ("000", "512 × 1024 ≈ 512 × 50 · 50 × 1024: 76,800 numbers", f"{factor_numbers:,}", verdict(factor_numbers == 76_800)),
    ("000", "… written for a weight, $W^T \\approx AB$", "error " + ", ".join(f"{v:.0%} ({name})" for name, v in lost.items()),
     verdict(lost["real weights"] < 0.2, "✓", "✗ for weights")),
    ("000, 003", "the change $\\Delta W$ has a low intrinsic rank", f"its rank in `q_proj` is {delta_ranks['q_proj'].replace(', ', ' or ')} of 256, but of the gain "
     + ", ".join(f"{k} directions keep {v:.0%}" for k, v in gained.items() if k in (2, 8, 32)),
     verdict(share_8 > 0.5, "✓ in effect", "not here")),
    ("000", "other directions have near-zero gradients",
     f"{near_zero:.1%} of the entries are below a hundredth of the typical size (half of the energy is in {half:.1%} of them)",
     verdict(near_zero > 0.5)),
    ("000, 003", "models reside on a low intrinsic dimension", f"$d_{{90}}$ = {said(measured_d90)} of {results['D']:,}",
     verdict(reached and measured_d90 < 0.1 * results["D"])),
    ("001", "it is measured in hundreds, not billions",
     f"{said(measured_d90)} for this small model and task; $d$ = 300 gets {mean_share[300]:.0%}",
     verdict(reached and measured_d90 < 1000, "✓", "✗ here")),
    ("Aghajanyan et al. 2020", "RoBERTa-large on MRPC: about 200 of 355 million",
     f"it has {roberta:,} parameters, so {200 / roberta:.5%}; ours {said(measured_d90)} of {results['D']:,}"
     + (f", {measured_d90 / results['D']:.2%}" if reached else ""), "another task, a larger model"),
]
table(rows)

# %% [markdown]
# ## Summary
#
# | | |
# |---|---|
# | rank | directions that a matrix uses; at most the smaller side; $W = BA$ with that many columns and rows |
# | by hand | elimination: count the pivots, in fractions |
# | in the computer | count $\sigma_i > \sigma_1 \max(m, n)\,\varepsilon$ |
# | best of rank $k$ | the first $k$ terms of the SVD, at a distance of $\sqrt{\sigma_{k+1}^2 + \dots}$ |
# | cost | $k\,(m + n)$ instead of $m\,n$ numbers |
# | a weight of low rank | has full-rank gradients and does not stay low, unless it is *built* as a product |
# | pretrained weights | full rank, no edge to cut at |
# | what fine-tuning adds | full rank on paper, a few directions in effect |
# | intrinsic dimension | how many random directions training needs; not a rank |
#
# **Read**
#
# - Li et al. 2018, [Measuring the Intrinsic Dimension of Objective Landscapes](https://arxiv.org/abs/1804.08838):
#   section 2, with the toy of ten demands.
# - Aghajanyan et al. 2020, [Intrinsic Dimensionality Explains the Effectiveness of Language Model
#   Fine-Tuning](https://arxiv.org/abs/2012.13255): figures 1 to 3.
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685): section 7.2, which subspaces are learned (chapter 08
#   draws that figure).
# - Meng et al. 2024, [PiSSA](https://arxiv.org/abs/2404.02948): adapters that start from the SVD.
# - `pefttools/rank.py`, `pefttools/elimination.py` and `pefttools/intrinsic.py`, which are short.
#
# **Next.** Chapter 02 makes a method of it: LoRA keeps $W_0$ and trains $\Delta W = \frac{\alpha}{r}BA$, low in rank
# by construction.
