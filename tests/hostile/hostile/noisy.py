"""Right answers from people who make noise: each keeps full marks. Not attacks; in the same form, to be graded beside them."""

from __future__ import annotations

from hostile.attack import Attack, _placed, put

RIGHT = """
def lora_forward(x, W0, A, B, alpha, bias=None):
    {before}
    y = F.linear(x, W0, bias) + alpha / A.shape[0] * (x @ A.T) @ B.T
    {after}
    return y
"""
NOISY: dict[str, Attack] = {}
ALL = 9


def noisy(name: str, what: str, outside: str = "", before: str = "", after: str = "", source: str = "") -> None:
    """A right `lora_forward` with something `outside` of it (in its cell), and `before` and `after` its one line."""
    text = source or outside + RIGHT.format(before=before or "pass", after=after or "pass")

    def make(course, folder):
        honest = tuple(name for name in course.points if name != "lora-forward")
        put(folder, course.with_answers({"lora-forward": _placed(text, course)}, honest))

    NOISY[name] = Attack(name, "honest, and noisy", what, make, earns=ALL)


noisy("prints-to-stderr", "prints to stderr, in the cell and in the work", "import sys\nprint('hello', file=sys.stderr)",
      "print('shapes', x.shape, file=sys.stderr)")
noisy("warns", "warnings of every kind, and one made an error for itself",
      "import warnings\nwarnings.warn('old')\nwarnings.simplefilter('always')", "warnings.warn('deprecated', FutureWarning)")
noisy("logs", "logging to stderr, at every level", "import logging\nlogging.basicConfig(level=logging.DEBUG, force=True)",
      "logging.getLogger('me').error('so far')\n    logging.debug(x)")
noisy("progress-bars", "text progress bars on stderr", "from tqdm import tqdm\nfor _ in tqdm(range(100)):\n    pass",
      "list(tqdm(range(3)))")
noisy("bitsandbytes", "imports bitsandbytes, which writes to stderr", "import bitsandbytes as bnb")
noisy("figures", "leaves Matplotlib figures open, also in the work", "import matplotlib.pyplot as plt\nplt.plot([1, 2])",
      "plt.figure()")
noisy("helpers", "defines helpers, a class and constants in its answer cell", """
SCALES = {}
class Scale:
    def __init__(self, alpha, r): self.value = alpha / r
def scaled(alpha, r):
    return SCALES.setdefault((alpha, r), Scale(alpha, r)).value
def lora_forward_inner(x, A, B): return (x @ A.T) @ B.T
""", source="""
def inner(x, A, B):
    return (x @ A.T) @ B.T
class Scale:
    def __init__(self, alpha, r):
        self.value = alpha / r
def lora_forward(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + Scale(alpha, len(A)).value * inner(x, A, B)
""")
noisy("magics", "IPython's magics and shell commands", "%matplotlib inline\n%config InlineBackend.figure_format = 'svg'\n"
      "!echo hello\n%time sum(range(10))\n%load_ext autoreload\n%autoreload 2\nimport math?\n")
noisy("await", "await at the top of the cell", "import asyncio\nawait asyncio.sleep(0.01)\nasync def later(): return 3\nassert await later() == 3")
noisy("seeds-and-dtype", "sets seeds, the default dtype and gradient mode for everybody",
      "import random, numpy\ntorch.manual_seed(0); random.seed(0); numpy.random.seed(0)\ntorch.set_default_dtype(torch.float64)\n"
      "torch.set_grad_enabled(False)\ntorch.set_printoptions(precision=2)\ntorch.use_deterministic_algorithms(True)")
noisy("last-expression", "a number as the cell's last expression, and a test of its own", source=RIGHT.format(before="pass", after="pass")
      + "\nassert lora_forward(torch.ones(2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1), 1.0).shape == (3,)\n0")
noisy("widgets", "shows HTML, Markdown and a widget", "from IPython.display import HTML, Markdown, display\nimport ipywidgets\n"
      "display(HTML('<b>hello</b>'), Markdown('**hi**'), ipywidgets.IntSlider())")
noisy("cell-magic", "%%time as the cell's first line", source="%%time\n" + RIGHT.format(before="pass", after="pass"))
noisy("own-case", "tries its work with `case` and `check`, as the chapter says",
      source=RIGHT.format(before="pass", after="pass") + "\nfrom pefttools.grading import check\ncheck('lora-forward', lora_forward)")
noisy("subprocess", "starts a process and threads, and waits for them", "import subprocess, sys, threading\n"
      "subprocess.run([sys.executable, '-c', 'print(1)'], check=True)\nt = threading.Thread(target=print, args=('x',)); t.start(); t.join()")
noisy("catches-errors", "an error of its own making in the cell, caught and shown", "import traceback\ntry:\n    1 / 0\n"
      "except ZeroDivisionError:\n    traceback.print_exc()")
noisy("unicode", "names and texts in other scripts", "α0 = 1.0\nΔ = 'Änderung 变化 تغيير 🙂'\nprint(Δ)")
noisy("prints-much", "prints some hundred thousand characters", "for n in range(3000): print('loss', n, '.' * 40)")
