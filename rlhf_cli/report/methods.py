"""What each method minimises or maximises, in the words and symbols of a model card, with its paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ARXIV = "https://arxiv.org/abs/"
MARGIN = "(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))"
SYMBOLS = "x: prompt; y: response with tokens y_t, the last one end-of-sequence"
PAIRS = "y_w, y_l: the preferred and the other response of a pair; σ: the logistic function"


@dataclass(frozen=True)
class Method:
    """One method as a card tells it.

    Args:
        name: in words.
        papers: arXiv numbers.
        formula: lines.
        where: what the symbols are, sentences without their full stops.
    """

    name: str
    papers: tuple[str, ...]
    formula: tuple[str, ...]
    where: tuple[str, ...] = ()


def sft() -> Method:
    """Return supervised fine-tuning."""
    formula = ("minimise  −mean over response tokens of log π(y_t | x, y_<t)",)
    return Method("Supervised fine-tuning (SFT) on demonstrations", (), formula, (SYMBOLS,))


def alignment(config: dict[str, Any]) -> Method:
    """Return the alignment method of a run's config; one that is not built in is named, without a formula."""
    algo = config["algo"]
    known = ALGORITHMS.get(algo["name"])
    if known is None:
        return Method(f"`{algo['name']}`, an algorithm of its author's own", (), ())
    method = known(algo)
    constraint = algo.get("constraint", {}).get("name", "none")
    if constraint == "none":
        return method
    bounded = f"To each pair's loss −log σ(δ* − z) is added, z = β[…] above: {_bound(constraint, algo['constraint'])}"
    return Method(method.name, (*method.papers, "2404.00978"), method.formula, (*method.where, bounded))


def reward(config: dict[str, Any]) -> Method:
    """Return how the reward model of a run's config was trained, or where else its rewards come from."""
    settings = config["reward"]
    name = settings["name"]
    where = (PAIRS, "r: the model's score at the last token of a response")
    pairs = ("minimise  −log σ(r(x, y_w) − r(x, y_l))",)
    if name == "gold":
        formula = ("r(x, y) = log of the share of people who give answer y to question x",)
        return Method("The survey world's own reward, known exactly", (), formula)
    if name == "bt":
        return Method("Bradley–Terry reward model", ("2203.02155",), pairs, where)
    if name == "warm":
        read = "their weights are averaged" if settings["combine"] == "weights" else "the mean of their rewards is read"
        more = f"{settings['members']} models of one initialisation, trained so; {read}"
        return Method("WARM, several reward models as one", ("2401.12187", "2203.02155"), pairs, (*where, more))
    if name.startswith("pcrm_"):
        formula = ("minimise  −log σ(d) − log σ(δ* − d),  d = r(x, y_w) − r(x, y_l)",)
        bound = _bound(name.removeprefix("pcrm_"), settings)
        return Method("Prior-constrained reward model (PCRM)", ("2404.00978",), formula, (*where, bound))
    return Method(f"`{name}`, a reward-model loss of its author's own", (), (), where)


def _bound(name: str, settings: dict[str, Any]) -> str:
    """Return what bounds a pair's margin, in words."""
    if name == "fixed":
        return f"δ* = {settings['delta']:g} for every pair"
    if name == "random":
        return f"δ* is drawn from U[{settings['low']:g}, {settings['high']:g}], once for each pair"
    alike = "ratio of the responses' lengths" if name == "length" else "likeness of the responses' embeddings"
    return (
        f"δ* = {settings['beta1']:g} / (s + {settings['beta2']:g}) {settings['beta3']:+g}, s the {alike}: "
        "what is alike may not differ much"
    )


def _kl_ppo(algo: dict[str, Any]) -> Method:
    formula = ("maximise  E_{y ~ π} [ r(x, y) − β Σ_t ( log π(y_t) − log π_ref(y_t) ) ]",)
    papers, where = _online(algo)
    optimum = ("its optimum:  π(y) ∝ π_ref(y) · exp(r(x, y) / β)",)
    return Method("KL-regularised RLHF, with PPO", ("1707.06347", *papers), formula + optimum, where)


def _pm(algo: dict[str, Any]) -> Method:
    papers, where = _online(algo)
    if algo["alpha"] is None:
        formula = ("maximise  E_{y ~ π} [ r(x, y) − β Σ_t log π(y_t) ]", "its optimum:  π(y) ∝ exp(r(x, y) / β)")
        return Method("Preference matching RLHF", ("2405.16455", *papers), formula, where)
    conditional = (
        "maximise  E_{y ~ π} [ r(x, y) − β Σ_t ( log π(y_t) − e_t ) ]",
        "e_t = 0 where π_ref(y_t) > α, else log π_ref(y_t)",
        "its optimum:  π(y) ∝ exp(r(x, y) / β) · Π_{t: π_ref(y_t) ≤ α} π_ref(y_t)",
    )
    return Method("Conditional preference matching RLHF", ("2405.16455", *papers), conditional, where)


def _online(algo: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return papers and explanations of what the on-policy methods share."""
    with_critic = algo["advantage"] == "gae"
    how = "advantages by GAE with a critic" if with_critic else "advantages against the other responses to a prompt"
    where = f"{SYMBOLS}; π_ref: the reference policy, from SFT; r: the reward"
    return ("1506.02438" if with_critic else "2402.14740",), (where, f"Optimised with PPO's clipped loss, {how}")


def _dpo(algo: dict[str, Any]) -> Method:
    formula = (f"minimise  −log σ( β [ {MARGIN} ] )",)
    where = f"{PAIRS}; π_ref: the reference policy, from SFT"
    return Method("Direct preference optimisation (DPO)", ("2305.18290",), formula, (where,))


def _rpo(algo: dict[str, Any]) -> Method:
    weight = "η β" if algo["sft_scale_by_beta"] else "η"
    of = {"sum": "log π(y_w)", "seq_mean": "log π(y_w) / |y_w|", "token_mean": "mean over tokens of log π(y_w,t)"}
    formula = (f"minimise  −log σ( β [ {MARGIN} ] ) − {weight} · {of[algo['sft_reduction']]}",)
    return Method("Regularised preference optimisation (RPO)", ("2405.16436",), formula, _dpo(algo).where)


def _dpm(algo: dict[str, Any]) -> Method:
    if algo["alpha"] is None:
        likelihood = "minimise  −log σ( β [ log π(y_w) − log π(y_l) ] )"
        return Method("Preference maximum likelihood", ("2506.01523",), (likelihood,), (PAIRS,))
    formula = (
        "minimise  −log σ( β [ (log π(y_w) − Σ_t e_w,t) − (log π(y_l) − Σ_t e_l,t) ] )",
        "e_t = 0 where π_ref(y_t) > α, else log π_ref(y_t)",
    )
    papers = ("2305.18290", "2405.16455")
    return Method("Direct preference matching: DPO's loss, PM's reference", papers, formula, _dpo(algo).where)


ALGORITHMS: dict[str, Callable[[dict[str, Any]], Method]] = {
    "kl_ppo": _kl_ppo,
    "pm": _pm,
    "dpo": _dpo,
    "rpo": _rpo,
    "dpm": _dpm,
}
