"""How :func:`blokern.sparse.compact` sees a network: as the elementary ops of one forward pass.

`record.py` runs the model once and hands every ATen op to its rule (`rules.py`; `products.py`, `elementwise.py`,
`movement.py`, `parts.py`, `reductions.py`), which says, in the terms of `channels.py`, which channels are the same
ones, which must stay, and what is constant. `cut.py` takes what nobody needs out of a copy, `witness.py` reads the
copy's own ops against the first reading, `comparison.py` compares outputs, and `plan.py` leads all this. `example.py`
finds an input where the caller gave none.
"""
