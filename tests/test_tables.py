"""Tables: their numbers, their order, what their captions state, and that both written forms read back."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from data_prep.tasks import TASKS
from meteora.study import tables
from meteora.study.claims import backend_ratios, claims_table, published_composite10


def independent_rows(values, metric="accuracy", n=40):
    """{method: {task: value}} -> the rows of independent.csv."""
    return pd.DataFrame(
        [
            {"task": task, "method": method, "metric": metric, "value": value, "low": value / 2, "high": value, "n": n}
            for method, by_task in values.items()
            for task, value in by_task.items()
        ]
    )


INDEPENDENT = independent_rows(
    {
        "lora_b": {"winowhy": 0.5, "cs_algorithms": 0.25},
        "peft": {"winowhy": 0.75, "cs_algorithms": 0.5},
        "meteora_top2": {"winowhy": 0.75, "cs_algorithms": 0.6},
        "base": {"winowhy": 0.0, "cs_algorithms": 0.1},
    }
)


def composite_rows():
    rows = []
    for protocol, temperature in (("guided", 15.0), ("sequential", 1.0)):
        for method, attempted, correct, accuracy in (("lora_b", 2.0, 1.0, 0.25), ("meteora_top2", 2.5, 1.5, 0.5)):
            for subtask, metric, value in (
                ("ALL", "attempted", attempted), ("ALL", "correct", correct), ("winowhy", "accuracy", accuracy),
            ):  # fmt: skip
                rows.append(
                    {
                        "composite": 3, "protocol": protocol, "shots": 2 * (protocol == "guided"),
                        "temperature": temperature, "subtask": subtask, "method": method, "metric": metric,
                        "value": value, "low": value - 0.1, "high": value + 0.1, "n": 16,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def benchmark_rows(times, metric="time_us"):
    """{backend: {tokens: value}} -> the rows of benchmark.csv that matter here."""
    common = {
        "workload": "layer", "mode": "forward", "launch": "eager", "routing": "uniform", "batch": 1, "adapters": 5,
        "rank": 8, "top_k": 2, "in_features": 576, "out_features": 576, "dtype": "float32",
    }  # fmt: skip
    return pd.DataFrame(
        [
            common | {"backend": backend, "tokens": tokens, "metric": metric, "value": value}
            for backend, by_tokens in times.items()
            for tokens, value in by_tokens.items()
        ]
    )


def test_means_are_unweighted_over_tasks():
    uneven = pd.concat(
        [independent_rows({"peft": {"winowhy": 1.0}}, n=1000), independent_rows({"peft": {"cs_algorithms": 0.0}}, n=10)]
    )
    [row] = tables.method_means(uneven).to_dict("records")
    assert (row["value"], row["tasks"], row["n"]) == (0.5, 2, 1010)
    assert (row["low"], row["high"]) == (0.5, 0.5)


def test_mean_interval_is_the_bootstrap_within_tasks():
    row = tables.method_means(INDEPENDENT).set_index("method").loc["peft"]
    half = 1.96 * ((0.75 * 0.25 + 0.5 * 0.5) / 40) ** 0.5 / 2
    assert row["value"] == 0.625
    assert (row["low"], row["high"]) == pytest.approx((0.625 - half, 0.625 + half), abs=0.02)


def test_table1_has_a_row_for_every_method_in_a_fixed_order():
    table = tables.table1(INDEPENDENT)
    assert table["method"].tolist() == ["Base model", "PEFT (told the task)", "MeteoRA top-2", "LoRA-B"]
    assert table.columns[1] == "accuracy (2 tasks)"
    assert re.fullmatch(r"0\.625 \[0\.5\d\d, 0\.7\d\d\]", table.set_index("method").iloc[1, 0])


def test_table1_of_text_metrics_says_how_many_tasks_have_them():
    bleu = independent_rows({"peft": {"alpaca": 12.5}, "base": {"alpaca": 3.0}}, metric="bleu")
    table = tables.table1(pd.concat([INDEPENDENT[INDEPENDENT["method"].isin(["base", "peft"])], bleu]))
    assert list(table.columns) == ["method", "accuracy (2 tasks)", "BLEU (1 task)"]
    assert table["BLEU (1 task)"].tolist() == ["3.00", "12.50"]


def test_table1_per_task_keeps_the_intervals_of_the_file():
    table = tables.table1_tasks(INDEPENDENT).set_index("task")
    assert table.loc["winowhy", "LoRA-B"] == "0.500 [0.250, 0.500]"
    assert table.loc["winowhy", "n"] == 40
    assert list(table.index) == ["cs_algorithms", "winowhy"]
    values = tables.table1_tasks(INDEPENDENT, intervals=False).set_index("task")
    assert values.loc["winowhy", "LoRA-B"] == "0.500" and values.loc["winowhy", "n"] == 40
    assert list(values.columns) == list(table.columns)


def test_methods_on_other_tasks_cannot_be_averaged():
    with pytest.raises(ValueError, match="'base' has no accuracy on cs_algorithms"):
        tables.table1(INDEPENDENT.drop(INDEPENDENT.index[-1]))
    with pytest.raises(ValueError, match="'peft' has two rows"):
        tables.method_means(independent_rows({"peft": {"winowhy": 1.0}}).loc[[0, 0]])
    with pytest.raises(ValueError, match="independent.csv lacks the columns low"):
        tables.table1(INDEPENDENT.drop(columns="low"))
    with pytest.raises(ValueError, match="no metric 'bleu'; it has accuracy"):
        tables.table1_tasks(INDEPENDENT, "bleu")


def test_table2_puts_meteora_beside_lora_b_and_names_the_setting():
    table = tables.table2(composite_rows())
    assert list(table.columns) == [
        "composite", "protocol", "shots", "T", "sub-task", "metric", "MeteoRA top-2", "LoRA-B", "n",
    ]  # fmt: skip
    assert len(table) == 6
    assert table.iloc[0].tolist() == [
        "composite-3", "guided", 2, "15", "ALL", "attempted (of 3)", "2.50 [2.40, 2.60]", "2.00 [1.90, 2.10]", 16,
    ]  # fmt: skip
    assert table.iloc[-1].tolist()[1:7] == ["sequential", 0, "1", "winowhy", "accuracy", "0.500 [0.400, 0.600]"]
    assert set(table["metric"]) == {"attempted (of 3)", "correct (of 1)", "accuracy"}, "one sub-task has an accuracy"


def test_table2_adds_other_methods_behind():
    rows = composite_rows()
    base = rows[rows["method"] == "lora_b"].assign(method="base")
    sequential = base[base["protocol"] == "sequential"]
    table = tables.table2(pd.concat([sequential, rows]))
    assert list(table.columns[6:9]) == ["MeteoRA top-2", "LoRA-B", "Base model"]
    assert table[table["protocol"] == "guided"]["Base model"].tolist() == ["", "", ""]


def test_captions_state_how_much_of_the_benchmark_is_covered():
    assert tables.coverage(list(TASKS)[:22]) == "22 of the paper's 28 tasks"
    assert tables.coverage(["winowhy", "made up"]) == "1 of the paper's 28 tasks and 1 others"
    assert "2 of the paper's 28 tasks" in tables.table1_caption(INDEPENDENT)
    assert "80 test samples" in tables.table1_caption(INDEPENDENT)
    bleu = independent_rows({"peft": {"topical_chat": 12.5}}, metric="bleu")
    caption = tables.table1_caption(pd.concat([INDEPENDENT, bleu]))
    assert "2 of the paper's 28 tasks (not topical_chat, which BLEU or ROUGE measure)" in caption and "80 test samples" in caption
    assert "composite-3 of 1 of the paper's 28 tasks" in tables.table2_caption(composite_rows())


def test_markdown_reads_back():
    table = pd.DataFrame({"a": ["x|y", "two\nlines"], "b": [0.12345, 2.0]})
    lines = tables.to_markdown(table, "Caption.").splitlines()
    assert lines[:2] == ["Caption.", ""]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
    assert cells == [["a", "b"], ["---", "---"], [r"x\|y", "0.123"], ["two lines", "2.000"]]


def test_latex_escapes_and_has_as_many_cells_as_columns():
    table = pd.DataFrame({"sub_task": ["50% & more", r"a\b{c}"], "n": [1, 2]})
    text = tables.to_latex(table, "22 of 28, 95%", "table1")
    assert r"\caption{22 of 28, 95\%}" in text and r"\label{tab:table1}" in text
    assert r"sub\_task & n \\" in text
    assert r"50\% \& more & 1 \\" in text
    assert r"a\textbackslash{}b\{c\} & 2 \\" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


def test_write_table_leaves_both_forms_and_nothing_else(tmp_path):
    paths = tables.write_table(tmp_path, "table1", tables.table1(INDEPENDENT), tables.table1_caption(INDEPENDENT))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table1.md", "table1.tex"]
    assert "| MeteoRA top-2 | 0.675 [" in paths[0].read_text()


def test_backend_ratios_compare_equal_cells_only():
    benchmark = benchmark_rows({"loop": {1: 100.0, 16: 800.0}, "bmm": {16: 200.0, 512: 9.0}})
    assert backend_ratios(benchmark, "loop", "bmm").tolist() == [4.0]
    assert backend_ratios(benchmark, "loop", "triton").empty


def test_claims_with_everything_measured():
    times = {"loop": {1: 90.0, 16: 600.0}, "bmm": {1: 45.0, 16: 100.0}, "single_lora": {1: 30.0, 16: 25.0}}
    metrics = {
        "independent": INDEPENDENT,
        "independent_paired": pd.DataFrame(
            [{"method": "meteora_top2", "other": "peft", "value": 0.05, "low": -0.02, "high": 0.12}]
        ),
        "composite": composite_rows(),
        "routing": pd.DataFrame(
            [
                {"layer": 0, "module": "q_proj", "task": t, "adapter": a, "share": 0.8 if t == a else 0.2}
                for t in "ab"
                for a in "ab"
            ]
        ),
        "benchmark": benchmark_rows(times),
    }
    table = claims_table(metrics, "laptop")
    found = dict(zip(table["claim"].str.lower(), table["measured here"]))
    assert found["per-token loop against the other strategies"] == "up to 6.0x (bmm), one layer"
    assert found["bmm-torch against the loop"] == "4.0x faster on average (2.0x to 6.0x), one layer"
    assert found["bmm-torch against its bound, a single lora"].startswith("2.8x slower on average")
    assert found["triton operator against bmm-torch"].startswith("not measured: notebook 05")
    against_peft = found["meteora against peft with the adapter chosen by hand"]
    assert "PEFT 0.625; MeteoRA top-2 0.675 (difference 0.050 [-0.020, 0.120]); 2 tasks" == against_peft
    attempted = found["composite-3, answers attempted: meteora top-2 against lora-b"]
    assert attempted == "guided, T=15: 2.50 against 2.00 (+25%); sequential, T=1: 2.50 against 2.00 (+25%)"
    assert "1.50 against 1.00 (+50%)" in found["composite-3, correct answers: meteora top-2 against lora-b"]
    assert "sequential, T=1: 1 won, 0 equal, 0 lost" in found["composite-3, sub-tasks won: meteora top-2 against lora-b"]
    assert found["the gates choose the adapter of the task at hand"].startswith("own adapter's share 0.80")
    assert table["command"].iloc[0] == "./run_all.sh --profile laptop --only 05"


def test_a_strategy_that_is_the_slower_one_is_called_so():
    benchmark = benchmark_rows({"loop": {1: 50.0, 16: 25.0}, "bmm": {1: 100.0, 16: 150.0}})
    claims = claims_table({"benchmark": benchmark}, "laptop").set_index("claim")["measured here"]
    assert claims["bmm-torch against the loop"] == "4.0x slower on average (2.0x to 6.0x), one layer"


def test_claims_on_composites_have_a_row_for_each_size():
    both = pd.concat([composite_rows(), composite_rows().assign(composite=5)])
    claims = claims_table({"composite": both}, "laptop")["claim"]
    assert [c for c in claims if "correct" in c] == [f"Composite-{n}, correct answers: MeteoRA top-2 against LoRA-B" for n in (5, 3)]


def test_claims_without_any_measurement_say_what_to_run():
    table = claims_table({}, "smoke")
    assert len(table) == 10
    assert table["measured here"].str.startswith("not measured: notebook 0").all()


def test_a_zero_of_lora_b_gives_no_percentage():
    rows = composite_rows()
    rows.loc[(rows["method"] == "lora_b") & (rows["metric"] == "correct"), "value"] = 0.0
    table = claims_table({"composite": rows}, "laptop").set_index("claim")
    cell = table.loc["Composite-3, correct answers: MeteoRA top-2 against LoRA-B", "measured here"]
    assert "1.50 against 0.00" in cell and "%" not in cell


def test_published_composite10_adds_up():
    table = published_composite10().set_index("sub-task")
    accuracies, total = table.iloc[:-1], table.iloc[-1]
    assert accuracies["MeteoRA"].sum() == pytest.approx(total["MeteoRA"], abs=0.005)
    assert accuracies["LoRA-B"].sum() == pytest.approx(total["LoRA-B"], abs=0.005)
    assert (accuracies * 128 - (accuracies * 128).round()).abs().max().max() < 0.1
