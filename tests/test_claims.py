"""The claims about composites: what composite.csv says to them, protocol by protocol, with and without examples."""

import pandas as pd

from meteora.study.claims import claims_table


def composite(runs) -> pd.DataFrame:
    """One item's worth of rows for (protocol, shots, temperature): MeteoRA 2 of 3, LoRA-B 1 of 3."""
    rows = [
        (3, protocol, shots, temperature, "ALL", method, metric, value + 0.5 * (metric == "attempted"), 0, 3, 40)
        for protocol, shots, temperature in runs
        for method, value in (("meteora_top2", 2.0), ("lora_b", 1.0))
        for metric in ("attempted", "correct")
    ]
    columns = "composite protocol shots temperature subtask method metric value low high n".split()
    return pd.DataFrame(rows, columns=columns)


def said(runs, claim="Composite-3, correct answers: MeteoRA top-2 against LoRA-B") -> str:
    claims = claims_table({"composite": composite(runs)}, "smollm2").set_index("claim")
    assert claims.loc[claim, "n"] == 40 and claims.loc[claim, "command"].endswith("--only 04")
    return claims.loc[claim, "measured here"]


def test_every_protocol_and_temperature_stands_by_itself():
    text = said([("numbered", 2, 15.0), ("numbered", 2, 1.0), ("sequential", 0, 1.0)])
    assert text == "; ".join(
        f"{run}: 2.00 against 1.00 (+100%)" for run in ("numbered, T=15", "numbered, T=1", "sequential, T=1")
    )


def test_protocols_may_have_more_items_than_others():
    frame = composite([("numbered", 2, 1.0), ("sequential", 0, 1.0)])
    frame.loc[frame["protocol"] == "sequential", "n"] = 200
    claims = claims_table({"composite": frame}, "smollm2").set_index("claim")
    assert claims.loc["Composite-3, correct answers: MeteoRA top-2 against LoRA-B", "n"] == "40 to 200"


def test_prompts_without_examples_are_told_apart():
    text = said([("numbered", 2, 1.0), ("numbered", 0, 1.0), ("sequential", 0, 1.0)])
    runs = ("numbered, T=1", "numbered, zero-shot, T=1", "sequential, T=1")
    assert text == "; ".join(f"{run}: 2.00 against 1.00 (+100%)" for run in runs)
    attempted = said([("guided", 0, 1.0)], "Composite-3, answers attempted: MeteoRA top-2 against LoRA-B")
    assert attempted == "guided, zero-shot, T=1: 2.50 against 1.50 (+67%)"


def test_the_difference_item_by_item_stands_beside_the_ratio():
    """Of the same method, setting and measure; without one, as in the other tests, the ratio stands alone."""
    runs = [("numbered", 2, 15.0), ("sequential", 0, 1.0)]
    columns = "composite protocol shots temperature method other metric value low high".split()
    paired = [
        (3, "sequential", 0, 1.0, "meteora_top2", "lora_b", "correct", 1.0, -0.25, 2.25),
        (3, "sequential", 0, 1.0, "meteora_top2", "lora_b", "attempted", 7.0, 7.0, 7.0),
        (3, "sequential", 0, 1.0, "meteora_top2", "peft", "correct", 7.0, 7.0, 7.0),
        (3, "sequential", 0, 1.0, "meteora_top1", "lora_b", "correct", 7.0, 7.0, 7.0),
        (3, "numbered", 0, 15.0, "meteora_top2", "lora_b", "correct", 7.0, 7.0, 7.0),
    ]
    metrics = {"composite": composite(runs), "composite_paired": pd.DataFrame(paired, columns=columns)}
    claims = claims_table(metrics, "smollm2").set_index("claim")["measured here"]
    assert claims["Composite-3, correct answers: MeteoRA top-2 against LoRA-B"] == (
        "numbered, T=15: 2.00 against 1.00 (+100%); "
        "sequential, T=1: 2.00 against 1.00 (+100%, difference 1.00 [-0.25, 2.25])"
    )


def test_switching_is_told_by_size_and_part():
    rows = [(size, part, value, value - 0.1, value, 8) for size in (3, 5) for part, value in (("problem", 0.9), ("answer", 1.0))]
    totals = pd.DataFrame(rows, columns="composite part value low high n".split())
    claims = claims_table({"switching_totals": totals}, "smollm2").set_index("claim")
    finding = claims.loc["The gates switch adapters where two tasks meet"]
    assert "composite-3: 0.900 [0.800, 0.900] of the problem's tokens, 1.000 [0.900, 1.000]" in finding["measured here"]
    assert "composite-5: " in finding["measured here"] and finding["n"] == 8
    assert claims_table({}, "smollm2").set_index("claim").loc[finding.name, "measured here"].startswith("not measured: notebook 04")
