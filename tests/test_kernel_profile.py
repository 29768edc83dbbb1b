"""The profile of the kernels: what is read from Nsight Compute's table, and what is profiled."""

import pytest
import torch

from meteora.study import kernel_profile
from meteora.study.kernel_profile import BACKENDS, COLUMNS, cases, main, read_profile

HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'


def kernel(number, name, duration, unit, memory, compute, occupancy):
    values = [
        ("GPU Speed Of Light Throughput", "Duration", unit, duration),
        ("GPU Speed Of Light Throughput", "Memory Throughput", "%", memory),
        ("GPU Speed Of Light Throughput", "Compute (SM) Throughput", "%", compute),
        ("GPU Speed Of Light Throughput", "Elapsed Cycles", "cycle", "12,345"),
        ("Occupancy", "Achieved Occupancy", "%", occupancy),
    ]
    start = f'"{number}","7","python3","127.0.0.1","{name}","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0"'
    return "\n".join(f'{start},"{section}","{metric}","{unit}","{value}"' for section, metric, unit, value in values)


def test_a_table_of_kernels_is_read_case_by_case():
    table = "\n".join(
        [
            "==PROF== Connected to process 7", HEAD,
            kernel(0, "spin_kernel(long)", "1.0", "us", "0", "0", "1"),
            kernel(1, "void gemm<(int)128>", "1,028.50", "ns", "81.5", "40.25", "12.5"),
            kernel(2, "_route", "2.5", "us", "10", "20", "30"),
            kernel(3, "spin_kernel(long)", "1.0", "us", "0", "0", "1"),
            kernel(10, "_expand", "0.25", "ms", "90", "5", "50"),
        ]
    )  # fmt: skip
    rows = read_profile(table)
    assert [(r["case"], r["order"], r["kernel"]) for r in rows] == [
        (0, 0, "void gemm<(int)128>"), (0, 1, "_route"), (1, 0, "_expand"),
    ]  # fmt: skip
    assert [r["time_us"] for r in rows] == pytest.approx([1.0285, 2.5, 250.0])
    assert rows[0]["memory"] == pytest.approx(0.815) and rows[0]["compute"] == pytest.approx(0.4025)
    assert rows[2]["occupancy"] == pytest.approx(0.5)


def test_a_table_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="no table"):
        read_profile("==ERROR== something else\n")


def test_the_cases_are_settings_of_the_benchmark():
    assert len(set(cases())) == len(cases())
    assert {mode for mode, _ in cases()} == {"forward", "backward"}
    assert set(COLUMNS[2:9]) <= set(vars(cases()[0][1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to profile")
def test_without_a_gpu_it_says_so(tmp_path, caplog):
    assert main(["--output", str(tmp_path / "profile.csv")]) == 2
    assert "there is none" in caplog.text and not (tmp_path / "profile.csv").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_case_runs(monkeypatch):
    few = [case for case in cases() if case[1].tokens == 16][:1] + [case for case in cases() if case[0] == "backward"][:1]
    monkeypatch.setattr(kernel_profile, "cases", lambda: few)
    kernel_profile.run_cases(torch.device("cuda"))
    assert len(BACKENDS) == 2
