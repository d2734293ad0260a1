# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Can a small model find one sentence in a million tokens?
#
# A model of seven million parameters reads a million tokens on your processor. One sentence of them is new: a secret
# code. Ask for it, hide it elsewhere, and look where the model looked. The rest of this page is the map of the course.
#
# After this notebook you will be able to
#
# * hide a needle anywhere in a million tokens, let the model find it, and see which chunks it read,
# * choose your way through the course, and find the notebook, the code and the test behind every equation,
# * say which of the paper's claims hold here, which differ, and which nobody tried.
#
# **Time:** 10 minutes to read, two minutes to run on two CPU cores, and from the second time on a few
# seconds. **Needs:** Nothing. You need no GPU.
#
# [01 why →](01_why.ipynb)

# %%
import os
import sys
from pathlib import Path

from IPython.display import Markdown
from tqdm import tqdm

from hsa_mini import HSAModel, course
from hsa_mini.data.corpus import load_corpus
from hsa_mini.evaluation.search import NeedleSearch
from hsa_mini.paths import cache_dir
from hsa_mini.viz import Control, make_figure, show
from hsa_mini.viz.course.course_map import course_map
from hsa_mini.viz.course.needle import explore_needle

TOKENS = int(os.environ.get("HSA_MINI_TOKENS", 1_048_576))  # at least 1,024

# %% [markdown]
# ## Find it
#
# The next cell reads 1,048,576 tokens of plays, program code and documentation, which the model never saw in training.
# It reads them **once**. We measured two minutes of one processor core for this, so it takes about a minute on two.
# The cell stores what the model remembers, 16,384 chunks in 0.6 GB, in the folder `~/.cache/hsa-mini/start`, which you
# may delete. From the second time on, the cell only loads it.
#
# Then it hides six sentences such as *The secret code of QXZB is 482913.* in the text and asks for one of them. The
# model reads again only the tokens near these sentences. This gives the same numbers as reading everything, in 1.5
# seconds of one core. **You should see** the six digits, the word *right*, and a high score for the chunk with the
# needle.
#
# Move the lens over the chunks with the mouse or the arrow keys. `PageUp` and `PageDown` go to the next chunk that a
# layer kept, and below you can read it. Change the depth (0 is the beginning of the text, 1 its end) or the seed, which
# draws other sentences. Every change asks the model again.

# %%
model = HSAModel.from_pretrained("mini")
text = load_corpus("validation").tokens[:TOKENS]
with tqdm(total=TOKENS, desc="reading", unit=" tokens", unit_scale=True, leave=False, delay=3, file=sys.stdout) as bar:
    search = NeedleSearch(model, text, cache_dir() / "start", bar.update)
explore_needle(search.find, depth=Control((0.0, 1.0, 0.05), start=0.4), seed=Control((0, 50), start=0))

# %%
# NBVAL_CHECK_OUTPUT
found = search.find(depth=0.4, seed=0)
print("the answer is the needle:", found.answer == found.expected)
print("a layer read the chunk with the needle:", found.retrieved)

# %% [markdown]
# **You should see** `True` twice. No window of this model reaches further than 128 tokens, and no layer reads more than
# eight chunks per token. How does it know which eight of 16,384? That is what the course explains.
#
# ## The map of the course
#
# Start with 01 and go on in order. Or begin where you like: each part can be read alone. An arrow in the picture leads
# from a notebook to one that builds on it.

# %%
headers = course.read_headers(Path.cwd())
figure = make_figure(11, 4)
show(figure, course_map(figure.subplots(), headers), colors=64)
Markdown(course.notebook_table(headers))

# %% [markdown]
# ## Symbols
#
# One letter is one size, in every notebook and in every file of the code.

# %%
Markdown(course.size_table())

# %%
Markdown(course.tensor_table())

# %% [markdown]
# Three more words. A **chunk** is $S$ tokens in a row. Its **landmark** is one vector that represents it. A **needle**
# is a sentence that does not belong to the text around it, and that a question asks for.
#
# ## From the paper to the code
#
# The paper is *Every Token Counts: Generalizing 16M Ultra-Long Context in Large Language Models* (Hu et al., ACL 2026,
# [arXiv 2511.23319](https://arxiv.org/abs/2511.23319)). Each line leads from a place in it to the notebook that
# explains it, to the code, and to the test that proves it.

# %%
Markdown(course.paper_table())

# %% [markdown]
# ## What holds
#
# The paper's claims, and what became of them here. *Reproduced*: our numbers show the same. *Different in small*: our
# small models show the opposite. *Not reproduced*: we see no clear difference. *Not attempted*: nobody tried it here.
# Most verdicts are computed from the result files. For the three needle tasks the rule is: among 16 million tokens
# `mini` answers at least as large a share of the questions as the paper's 8B. (Its questions have the form of its
# training, so this says nothing about language.) For the ten claims about parts of the model,
# [notebook 13](13_laboratory.ipynb) explains the rule.

# %%
Markdown(course.claim_table())

# %%
# NBVAL_CHECK_OUTPUT
verdicts = [verdict for _, verdict, _, _ in course.claim_rows()]
for verdict in course.VERDICTS:
    print(f"{verdicts.count(verdict):2} {verdict}")

# %% [markdown]
# **You should see** as many failures as this project found, not none.
#
# ## Exercises
#
# **1. How many chunks are kept by luck?** A layer keeps 8 of 16,384 chunks. If it chose at random, how often would the
# chunk of the needle be among them? And in two layers that choose independently of each other?
#
# <details>
# <summary>Solution</summary>
#
# In one layer $8/16384$, which is 1 in 2048. In at least one of two layers $1 - (1 - 1/2048)^2$, about 1 in 1024.
#
# ```python
# one = 8 / 16_384
# two = 1 - (1 - one) ** 2
# print(f"1 in {1 / one:.0f}, 1 in {1 / two:.0f}")
# assert round(1 / one) == 2048 and round(1 / two) == 1024
# ```
#
# </details>
#
# **2. Does the depth matter?** Ask for needles at the beginning, in the middle and at the end. Is the answer right
# everywhere?
#
# <details>
# <summary>Solution</summary>
#
# ```python
# answers = {depth: search.find(depth=depth, seed=1).correct for depth in (0.0, 0.5, 1.0)}
# print(answers)
# assert all(answers.values())
# ```
#
# Three questions prove little. [Notebook 12](12_sixteen_million.ipynb) asks thousands, and says what they prove.
#
# </details>
#
# ## What comes next
#
# [Notebook 01, *Why not simply attend to everything?*](01_why.ipynb) begins with the costs of the usual method. It
# takes 15 minutes. To ask your own text, see `explore_retrieval` in the README.
