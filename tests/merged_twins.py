"""A model's merged twins: each candidate wherever it fits, compared in float64 by `depthfuse.merge`."""

import torch
from nets import randomise_norms

from depthfuse import Supernet, merge


def every_candidate_merges_exactly(model, blocks, size, becomes):
    """becomes: {candidate: name of the class that its merged blocks have}."""
    supernet = Supernet(model).eval()
    assert len(supernet.blocks) == blocks
    x = torch.randn(2, *size)
    with torch.no_grad():
        wanted, given = model(x), supernet(x)
    assert torch.equal(getattr(given, "logits", given), getattr(wanted, "logits", wanted))
    options = supernet.options()
    for candidate in dict.fromkeys(name for names in options.values() for name in names):
        chosen = {path: candidate for path, names in options.items() if candidate in names}
        supernet.set_choices(chosen)
        randomise_norms(supernet)
        merged = merge(supernet, size)
        assert max(max(b.border, b.interior) for b in merged.merge_report.blocks) < 1e-10
        assert merged.merge_report.output < 1e-10
        kinds = {type(m).__name__ for path, m in merged.named_modules() if path in chosen}
        assert kinds == {becomes.get(candidate, "MergedConv")}


@torch.no_grad()
def the_path_begins_at_the_original(model, size, tolerance=1e-5):
    """At lambda = 1 every candidate's block is the block itself, and close to it just before."""
    model, x = model.double(), torch.randn(2, *size, dtype=torch.float64)
    supernet = Supernet(model).eval()
    wanted = model(x)
    for candidate in dict.fromkeys(name for names in supernet.options().values() for name in names):
        chosen = {path: candidate for path, names in supernet.options().items() if candidate in names}
        supernet.set_choices(chosen, 1.0)
        assert torch.equal(supernet(x), wanted)
        for mixing in ("op", "block"):
            supernet.set_mixing(mixing)
            supernet.set_choices(chosen, 1 - 1e-9)
            assert (supernet(x) - wanted).abs().max() < tolerance * wanted.abs().max()
        supernet.set_mixing("op")
