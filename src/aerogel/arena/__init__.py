"""A fair arena: every pruning method on one network and data, under one budget and the same seeds.

    plan = Arena(model="digits_mlp", data="digits", sparsities=(0.5, 0.9), seeds=(0, 1))
    outcome = run(plan, "runs/arena", workers=2)

One dense network is trained for each seed, and every method starts from it and takes the same
number of further steps. A method that starts from initial weights has the steps of both phases, so
that all come to the same whole. A trial is a compression run of its own: one which was killed goes
on where it was.
"""

from aerogel.arena.plan import Arena, Trial
from aerogel.arena.run import Outcome, Row, run
from aerogel.arena.table import markdown, page

__all__ = ["Arena", "Outcome", "Row", "Trial", "markdown", "page", "run"]
