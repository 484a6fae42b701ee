"""The page on amortised inference: its snippets run, one after the other, and it leaves no public name out."""

import re
from pathlib import Path

import torch

from fspace.inference import amortized

PAGE = Path(__file__).resolve().parents[3] / "docs" / "amortised.md"


def test_snippets_run_and_say_what_the_page_says(capsys):
    torch.manual_seed(0)
    space: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), space)
    printed = capsys.readouterr().out
    assert "nan" not in printed and "inf" not in printed
    # what the text around the snippets says of them
    vae, x, bits = space["vae"], space["x"], space["bits"]
    trained = amortized.iwae(amortized.log_weights(vae, x, 64)).mean()
    assert trained > amortized.iwae(amortized.log_weights(type(vae)(), x, 64)).mean() + 5
    q = space["Laplace"](torch.zeros(3, 2, requires_grad=True), torch.ones(3, 2))
    assert isinstance(q, amortized.Proposal) and q.log_prob(q.sample(4)).shape == (4, 3)
    assert all(p.grad is not None for p in (*bits.parameters(), *space["walk"].parameters()))
    assert space["paths"].shape == (20, 30, 4)
    assert space["found"].log_evidence.isfinite().all()


def test_every_estimator_and_bound_is_on_the_page():
    text = PAGE.read_text()
    names = [n for file in ("bounds", "gradients", "score", "evaluate") for n in amortized._WHERE[file]]
    for name in (
        *names,
        "rebar",
        "relax",
        "Concrete",
        "sparse_elbo",
        "annealed_importance",
        "backward_simulation",
    ):
        if name not in ("Estimate", "LogLikelihood"):
            assert re.search(rf"\b{name}\b", text), name
