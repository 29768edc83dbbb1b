"""What benchmark.csv says: its figures, the ratios behind them, the aims and the claims that are read from it."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from meteora.study import figures
from meteora.study.benchmark_results import AIMS, SETTING, aims_table, best_launch, side_by_side
from meteora.study.claims import backend_ratios, claims_table
from meteora.study.figures_roofline import necessary_work

FACTOR = {"loop": 8.0, "bmm": 2.0, "dense": 1.0, "single_lora": 0.5}
SIZES = ((576, 576), (576, 1536))


def row(workload, backend, tokens, adapters, size, metric, value, **other):
    return {
        "workload": workload, "backend": backend, "mode": "forward", "launch": "eager", "routing": "uniform",
        "batch": 1, "tokens": tokens, "adapters": adapters, "rank": 8, "top_k": 2, "in_features": size[0],
        "out_features": size[1], "dtype": "float32", "metric": metric, "value": value, "p20": 0.9 * value,
        "p80": 1.2 * value, "device": "a CPU",
    } | other  # fmt: skip


def benchmark(factor=FACTOR, sizes=SIZES, adapters=(5, 28), tokens=(1, 16, 512), **other):
    """Rows of a layer: time is tokens * adapters * factor, memory tokens * factor (MiB)."""
    rows = []
    for size in sizes:
        for n in adapters:
            for t in tokens:
                for backend, f in factor.items():
                    rows.append(row("layer", backend, t, n, size, "time_us", f * t * n, **other))
                    rows.append(row("layer", backend, t, n, size, "peak_bytes", f * t * 2**20, **other))
    return pd.DataFrame(rows)


def tasks(routing="uniform"):
    """Rows of three tasks' prompts, two of them with as many tokens."""
    return pd.DataFrame(
        row("tasks", backend, tokens, 3, size, "time_us", f * tokens * 1e5, routing=routing)
        for size in SIZES
        for tokens in (30, 30, 50)
        for backend, f in FACTOR.items()
    )


def device(bytes_per_s=1e9, flop_per_s=1e11):
    return pd.DataFrame(
        row("device", backend, 1024, 0, (1024, 1024), metric, value, routing="none", rank=0, top_k=0)
        for backend, metric, value in (("copy", "bytes_per_s", bytes_per_s), ("matmul", "flop_per_s", flop_per_s))
    )


def whole_model(factor, launches=("graph", "eager"), **other):
    """Rows of a whole model: time is 100 us a token (prefill) or context (decode) times the factor."""
    rows = []
    cells = [("prefill", 1, t) for t in (512, 2048)] + [("decode", b, 1024) for b in (1, 32)]
    for mode, batch, tokens in cells:
        for backend, f in factor.items():
            common = {"mode": mode, "batch": batch, **other}
            work = batch * (tokens if mode == "prefill" else 1)
            time = 100.0 * work * f
            for launch in launches:
                common["launch"] = launch
                rows.append(row("model", backend, tokens, 28, (4096, 128256), "time_us", time, **common))
                rows.append(row("model", backend, tokens, 28, (4096, 128256), "tokens_per_s", 1e6 * work / time, **common))
            common["launch"] = "eager"
            rows.append(row("model", backend, tokens, 28, (4096, 128256), "peak_bytes", f * work * 2**20, **common))
    return pd.DataFrame(rows)


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def line(axes, label):
    return next(line for line in axes.get_lines() if line.get_label().startswith(label))


# Figure 5 ------------------------------------------------------------------------------------------------------------


def test_figure5_adds_up_the_time_of_equal_settings():
    rows = benchmark()
    extra = rows[(rows["backend"] == "loop") & (rows["tokens"] == 1)].assign(tokens=2, value=1e9)
    [axes] = figures.figure5_total_time(pd.concat([rows, extra])).axes
    total = 2 * (5 + 28) * (1 + 16 + 512) / 1000
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([total / 2, total, 2 * total, 8 * total])
    assert "12 settings" in words(axes.figure)
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == ["single_lora", "dense", "bmm", "loop"]
    assert "(16.0x)" in words(axes.figure), "in times of one LoRA"


def test_figure5_is_of_the_tasks_prompts_with_a_panel_for_each_routing():
    figure = figures.figure5_total_time(pd.concat([benchmark(), tasks("runs"), tasks()]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["uniform routing", "runs routing"]
    assert "110 tokens of 3 tasks' prompts, 2 linear layers\n3 adapters of rank 8, top-2" in figure.get_suptitle()
    seconds = 2 * (30 + 30 + 50) * 1e5 * 1e-6
    for axes in figure.axes:
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([f * seconds for f in (0.5, 1, 2, 8)])
        assert "(s)" in axes.get_xlabel()


def test_figure5_compares_equal_work_only():
    rows = benchmark()
    with pytest.raises(ValueError, match="no setting in which every strategy was timed"):
        figures.figure5_total_time(rows[(rows["backend"] == "loop") == (rows["tokens"] == 1)])


# Curves --------------------------------------------------------------------------------------------------------------


def test_lines_over_tokens():
    figure = figures.benchmark_over(benchmark(), "tokens")
    assert len(figure.axes) == 4
    loop = line(figure.axes[0], "loop")
    assert loop.get_xdata().tolist() == [1, 16, 512]
    assert loop.get_ydata() == pytest.approx([8 * tokens * 28 / 1000 for tokens in (1, 16, 512)])
    assert "forward pass, 28 adapters, rank 8, top-2, float32, eager, uniform routing, a CPU" == figure.get_suptitle()
    assert figure.axes[0].get_ylabel() == "time (ms)" and figure.axes[2].get_ylabel() == "extra memory (MiB)"


def test_lines_over_adapters_for_the_fewest_and_the_most_tokens():
    figure = figures.benchmark_over(benchmark(), "adapters")
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == [f"{a} → {b}, {tokens}" for a, b in SIZES for tokens in ("1 token", "512 tokens")]
    loop = line(figure.axes[1], "loop")
    assert loop.get_xdata().tolist() == [5, 28]
    assert loop.get_ydata() == pytest.approx([8 * 512 * n / 1000 for n in (5, 28)])


def test_curves_differ_in_the_backend_only():
    runs, rank = benchmark(routing="runs").assign(value=1e6), benchmark(rank=64).assign(value=1e7)
    both = pd.concat([runs, rank, benchmark(), benchmark(mode="backward").assign(value=1e8)])
    figure = figures.benchmark_over(both)
    assert "rank 8" in figure.get_suptitle() and "uniform routing" in figure.get_suptitle()
    assert line(figure.axes[0], "loop").get_ydata()[0] == pytest.approx(8 * 28 / 1000)
    assert line(figures.benchmark_over(both, routing="runs").axes[0], "loop").get_ydata()[0] == 1e3
    assert "rank 64" in figures.benchmark_over(both, rank=64).get_suptitle()
    assert line(figures.benchmark_over(both, mode="backward").axes[0], "loop").get_ydata()[0] == 1e5


def test_a_study_of_many_adapters_does_not_decide_what_is_drawn_over_tokens():
    many = benchmark(sizes=SIZES[:1], adapters=(256,), tokens=(16,))
    figure = figures.benchmark_over(pd.concat([benchmark(adapters=(28,)), many]))
    assert "28 adapters" in figure.get_suptitle() and len(figure.axes) == 4
    over = figures.benchmark_over(pd.concat([benchmark(adapters=(28,)), many]), "adapters")
    assert [axes.get_title() for axes in over.axes] == ["576 → 576, 16 tokens", ""]
    assert line(over.axes[0], "dense").get_xdata().tolist() == [28, 256]


def test_what_no_graph_holds_is_drawn_eagerly_and_said():
    graph = benchmark({"dense": 0.1, "single_lora": 0.1}, launch="graph")
    nothing = benchmark({"loop": 1.0}, launch="graph").assign(value=np.nan)
    figure = figures.benchmark_over(pd.concat([benchmark(), graph, nothing]))
    assert "CUDA graph (loop, bmm: eager)" in figure.get_suptitle()
    assert line(figure.axes[0], "dense").get_ydata()[0] == pytest.approx(0.1 * 28 / 1000)
    assert line(figure.axes[0], "loop").get_ydata()[0] == pytest.approx(8 * 28 / 1000)


def test_memory_is_left_out_that_was_not_measured():
    rows = benchmark()
    assert len(figures.benchmark_over(rows[rows["metric"] == "time_us"]).axes) == 2
    with pytest.raises(ValueError, match="mode 'backward'"):
        figures.benchmark_over(rows, mode="backward")
    with pytest.raises(ValueError, match="not over 'rank'"):
        figures.benchmark_over(rows, "rank")
    with pytest.raises(ValueError, match="benchmark.csv lacks the columns p20"):
        figures.benchmark_over(rows.drop(columns="p20"))


def test_ratios_are_to_one_lora_with_a_row_for_each_rank():
    rows = pd.concat([benchmark(), benchmark(rank=64)])
    fused = [rows[rows["backend"] == "dense"].assign(backend=name) for name in ("triton", "auto")]
    figure = figures.benchmark_ratios(pd.concat([rows, *fused]))
    assert [axes.get_title() for axes in figure.axes] == [f"{a} → {b}, rank {r}" for r in (8, 64) for a, b in SIZES]
    for axes in figure.axes:
        assert line(axes, "dense").get_ydata().tolist() == line(axes, "triton").get_ydata().tolist() == [2, 2, 2]
        assert not {"loop", "auto"} & {text.get_label().partition(" ")[0] for text in axes.get_lines()}
        heights = [float(line.get_ydata()[0]) for line in axes.get_lines() if len(set(line.get_xdata())) == 2]
        assert heights == [1, 1.15]
    assert "1.15x, the aim" in figure.get_suptitle()
    backward = figures.benchmark_ratios(benchmark(mode="backward"), "backward")
    assert all(line(axes, "loop").get_ydata().tolist() == [16, 16, 16] for axes in backward.axes)
    assert "aim" not in backward.get_suptitle(), "the fused kernels' aim is not for the others"
    assert all(set(line.get_ydata()) != {1.3} for axes in backward.axes for line in axes.get_lines())


# The roofline --------------------------------------------------------------------------------------------------------


def test_necessary_work_is_counted_by_hand():
    names = ["tokens", "adapters", "rank", "top_k", "in_features", "out_features", "dtype"]
    setting = pd.DataFrame([(2, 28, 8, 2, 10, 30, "bfloat16"), (100, 3, 4, 1, 10, 30, "float32")], columns=names)
    work = necessary_work(setting)
    assert work["flop"].tolist() == [2 * 2 * (28 * 10 + 16 * 40), 2 * 100 * (3 * 10 + 4 * 40)]
    few = 2 * (2 * 10 + 2 * 2 * 30 + 4 * 8 * 40) + 4 * 28 * 10  # two tokens can want four adapters at most
    many = 4 * (100 * 10 + 2 * 100 * 30 + 3 * 4 * 40) + 4 * 3 * 10
    assert work["bytes"].tolist() == [few, many]
    one = necessary_work(setting, single=True).iloc[0]
    assert one["flop"] == 2 * 2 * 8 * 40 and one["bytes"] == 2 * (2 * 10 + 2 * 2 * 30 + 8 * 40)


def test_roofline_has_a_roof_and_the_backends_below_each_other():
    rows = pd.concat([benchmark(), benchmark(rank=64), device()])
    figure = figures.roofline(rows)
    assert [axes.get_title() for axes in figure.axes] == ["rank 8", "rank 64"]
    axes = figure.axes[0]
    x, y = axes.get_lines()[0].get_data()
    assert y.max() == 1e11 and y[0] == pytest.approx(1e9 * x[0])
    loop, dense = line(axes, "loop"), line(axes, "dense")
    assert loop.get_xdata().tolist() == dense.get_xdata().tolist() and len(loop.get_xdata()) == 12
    assert (dense.get_ydata() / loop.get_ydata()).tolist() == pytest.approx([8] * 12)
    assert "1 GB/s" in words(figure) and "0.1 TFLOP/s" in words(figure)
    with pytest.raises(ValueError, match="no rows of workload device"):
        figures.roofline(benchmark())
    with pytest.raises(ValueError, match="no forward pass with routing 'runs' and top-2"):
        figures.roofline(rows, routing="runs")


def test_no_figure_stays_open():
    rows = pd.concat([benchmark(), device()])
    for draw in (figures.benchmark_over, figures.benchmark_ratios, figures.roofline, figures.figure5_total_time):
        draw(rows)
    assert plt.get_fignums() == []


# Aims and claims -----------------------------------------------------------------------------------------------------


def test_the_best_launch_is_the_graph_where_there_is_one():
    rows = pd.concat([benchmark(), benchmark({"dense": 0.5, "loop": np.nan}, launch="graph")])
    table = side_by_side(rows)
    assert (table["loop"] / table["dense"]).tolist() == pytest.approx([16] * 12)
    assert list(table.index.names) == SETTING
    assert not best_launch(rows).duplicated([*SETTING, "backend", "metric"]).any()


GPU = {"single_lora": 1.0, "dense": 1.5, "bmm": 100.0, "loop": 300.0, "triton": 1.1, "auto": 1.1}
QUARTERS = {"adapters": (28,), "tokens": (16, 256, 4096), "sizes": ((4096, 4096),)}


def test_every_aim_is_found_in_a_whole_record_and_reached_where_it_is():
    modes = [benchmark(GPU, **QUARTERS, rank=r, routing=s, mode=m) for r in (8, 64) for s in ("uniform", "runs")
             for m in ("forward", "backward")]  # fmt: skip
    model = whole_model({"base": 1.0, "single_lora": 1.2, "triton": 1.1, "auto": 1.1, "loop": 12.0, "dense": 1.3})
    rows = pd.concat([*modes, model])
    table = aims_table(rows)
    assert list(table["case"].unique()) == [aim.case for aim in AIMS]
    assert (table["reached"] == "yes").all() and (table["within"] == table["settings"]).all()
    speed = table[table["aim"] == "at least 50x as fast as bmm"].iloc[0]
    assert speed["median"] == speed["worst"] == pytest.approx(100 / 1.1) and speed["settings"] == 4
    assert set(table[table["aim"].str.contains("best single")]["backend"]) == {"auto"}

    slow = rows["backend"].eq("triton") & rows["tokens"].eq(4096) & rows["rank"].eq(8) & rows["routing"].eq("runs")
    missed = aims_table(rows.assign(value=rows["value"].where(~slow, 1.2 * rows["value"])))
    first = missed.iloc[0]
    assert (first["backend"], first["reached"], first["within"], first["settings"]) == ("triton", "no", 1, 2)
    assert first["worst"] == pytest.approx(1.32) and first["median"] == pytest.approx(1.21)
    assert first["worst_at"] == "forward, 4096 -> 4096, 4096 tokens, 28 adapters, rank 8, top-2, runs"


def test_a_whole_models_aims_are_looked_at_in_each_way_of_launching():
    model = whole_model({"base": 1.0, "single_lora": 1.2, "triton": 1.1, "loop": 12.0})
    slow = model["launch"].eq("eager") & model["backend"].eq("triton") & model["tokens"].eq(2048)
    table = aims_table(model.assign(value=model["value"].where(~slow, 2 * model["value"]))).set_index("case")
    assert table.loc["whole model, prefill in a CUDA graph", ["median", "within", "settings"]].tolist() == [
        pytest.approx(1.1), 2, 2,
    ]  # fmt: skip
    eager = table.loc["whole model, prefill"]
    assert (eager["reached"], eager["within"], eager["worst"]) == ("no", 1, pytest.approx(2.2))
    assert eager["worst_at"] == "prefill, eager, 1 x 2048 tokens, 28 adapters, rank 8, top-2, uniform"
    loop = table.loc["whole model, beside the loop"]
    assert loop["worst"] == pytest.approx(12 / 2.2) and loop["settings"] == 4, "eager against eager"


# A whole model -------------------------------------------------------------------------------------------------------


def test_a_whole_model_is_drawn_over_tokens_and_contexts():
    slow = {"loop": 20.0}
    rows = pd.concat([whole_model({"base": 1.0, "triton": 1.1}), whole_model(slow, ("eager",))])
    figure = figures.model_speed(rows)
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["prefill, 1 prompt at once", "decode, contexts of 1024 tokens"]
    speed, decoding, ratio = figure.axes[:3]
    assert line(speed, "triton").get_xdata().tolist() == [512, 2048]
    assert line(speed, "triton").get_ydata() == pytest.approx([1e4 / 1.1] * 2)
    assert line(decoding, "triton").get_xdata().tolist() == [1, 32]
    assert line(ratio, "triton").get_ydata() == pytest.approx([1.1, 1.1])
    assert line(ratio, "loop").get_ydata() == pytest.approx([20.0, 20.0]), "against the base model launched likewise"
    assert "base" not in [drawn.get_label().split()[0] for drawn in ratio.get_lines()]
    assert "CUDA graph (loop: eager)" in figure.get_suptitle() and "28 adapters of rank 8" in figure.get_suptitle()
    assert line(figure.axes[4], "triton").get_ydata() == pytest.approx([1.1 * 512, 1.1 * 2048])


def test_without_graphs_a_whole_model_is_drawn_as_it_was_launched():
    rows = whole_model({"base": 1.0, "dense": 3.0}, ("eager",))
    assert figures.model_speed(rows).get_suptitle().endswith("float32, eager; dotted: 1.15x, the aim")
    with pytest.raises(ValueError, match="no rows of workload model"):
        figures.model_speed(benchmark())


def test_a_slower_launch_is_drawn_if_it_is_asked_for():
    rows = whole_model({"base": 1.0, "triton": 1.1})
    slow = rows["launch"].eq("eager") & rows["backend"].eq("triton") & rows["metric"].eq("time_us")
    rows = rows.assign(value=rows["value"].where(~slow, 2 * rows["value"]))
    assert line(figures.model_speed(rows, launch="eager").axes[2], "triton").get_ydata() == pytest.approx([2.2, 2.2])
    assert line(figures.model_speed(rows).axes[2], "triton").get_ydata() == pytest.approx([1.1, 1.1])


def test_without_our_backends_there_is_no_aim():
    assert aims_table(benchmark()).empty
    claims = claims_table({"benchmark": pd.concat([benchmark(), device()])}, "laptop")
    assert not claims["claim"].str.startswith("Backend").any()


def test_the_aims_stand_among_the_claims():
    claims = claims_table({"benchmark": benchmark(GPU, **QUARTERS)}, "smollm2").set_index("claim")
    first = claims.loc["Backend triton, forward, rank 8, 512 tokens and more"]
    assert first["paper"] == "our aim: at most 1.15x single_lora" and first["n"] == 1
    assert first["measured here"].startswith("reached: median 1.10x, at worst 1.10x (forward, 4096 -> 4096, 4096")
    assert first["command"] == "./run_all.sh --profile smollm2 --only 05"


def test_the_papers_ratios_are_those_of_the_tasks_prompts():
    rows = pd.concat([benchmark(GPU), tasks(), tasks("runs")])
    claims = claims_table({"benchmark": rows}, "smollm2").set_index("claim")
    assert claims.loc["bmm-torch against the loop", "measured here"].startswith("4.0x faster on average (4.0x to 4.0x), the tasks")
    assert claims.loc["bmm-torch against the loop", "n"] == 3 * 2 * 2
    assert len(backend_ratios(rows, "loop", "bmm", workload="tasks")) == 12
    assert backend_ratios(rows, "loop", "bmm").tolist() == [3.0] * 12
