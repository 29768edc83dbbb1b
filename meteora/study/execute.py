"""Running one notebook without a browser: papermill, on this very Python, with a bar that shows how far it is."""

from __future__ import annotations

import copy
import logging
import os
import re
from pathlib import Path
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill import execute_notebook
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from meteora.study.artifacts import write_text
from meteora.study.records import RunError

logger = logging.getLogger(__name__)

_BAR = re.compile(r"[^\n]*?\d%\|[^|\n]*\|[^\[\n]*\[[^\]\n]*\]")  # tqdm's; what was written while it moved stands behind
# nbconvert's own style sets code in a proportional font where a cell displays it, and breaks it inside words
_STYLE = ".jp-OutputArea-output pre{word-break:normal;overflow-wrap:anywhere;font-family:var(--jp-code-font-family)}"


class NotebookError(RunError):
    """A notebook that failed; the message names it, the cell, and the error."""


class _OwnKernel(AsyncKernelManager):
    """Always the Python that is running: a kernel called python3 may be registered elsewhere, for another one."""

    @property
    def kernel_spec(self) -> KernelSpec:
        kernel = get_kernel_dict(extra_arguments=["--log-level=CRITICAL"])
        # tqdm advises to install ipywidgets, whose bars would be missing from a page that nobody's browser runs
        # PEFT asks every attribute of a model, also those that transformers calls deprecated
        env = {"PYTHONWARNINGS": "ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated"}
        # with another backend, which a machine without a screen may have set, a page shows no figure
        env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        return KernelSpec(**kernel, env=env)


class _InnerBar:
    """A text stream that shows the progress bar written to it behind another bar, as long as it moves."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def write(self, text: str) -> None:
        # tqdm begins every state of a bar with a carriage return and ends the last one with a line feed
        _, redrawn, state = text.rpartition("\r")
        if self._bar is not None:
            self._bar.set_postfix_str(state.strip()[:100] if redrawn and not state.endswith("\n") else "")

    def flush(self) -> None:
        """Nothing is held back."""


class _Engine(NBClientEngine):
    """papermill's own engine on `_OwnKernel`, its bar showing the notebook's own."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        options["stderr_file"] = _InnerBar(nb_man.pbar)
        # of a text that was redrawn in place, such as a bar, the page is to show the last state
        options |= {"kernel_manager_class": _OwnKernel, "coalesce_streams": True}
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


papermill_engines.register("study", _Engine)


def run_notebook(notebook: Path, executed: Path, page: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook in its own folder; ``executed`` (.ipynb) and ``page`` (.html) appear if it ran to its end.

    Raises:
        NotebookError: if a cell failed; what was executed is then beside ``executed``, named ``*.failed.ipynb``.
    """
    executed.parent.mkdir(parents=True, exist_ok=True)
    partial = executed.with_name(f".{executed.name}.{os.getpid()}.ipynb")
    failed = executed.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    # disable=None: no bar where the output is not a terminal
    bar = {"desc": f"  {notebook.stem}", "leave": False, "disable": None, "dynamic_ncols": True}
    bar["bar_format"] = "{desc} {bar:12} cell {n_fmt}/{total_fmt} {elapsed}{postfix}"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        node = execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            engine_name="study",
            kernel_name="python3",
            language="python",
            cwd=notebook.parent,
            progress_bar=bar,
        )
        write_text(page, _to_html(node, notebook))
        os.replace(partial, executed)
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        last = (error.evalue.strip().splitlines() or [""])[-1]
        begin = next((line for line in error.source.splitlines() if line.strip()), "")
        raise NotebookError(
            f"{notebook.name}, cell [{error.exec_count}] ({begin[:60]}): {error.ename}: {last} (all of it: {failed})"
        ) from error
    except DeadKernelError as error:
        raise NotebookError(
            f"{notebook.name}: its Python process died, most likely for lack of memory; free some, or lower the "
            "profile's batch sizes."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _to_html(node: Any, notebook: Path) -> str:
    """One HTML file with its pictures inside, without the bars, which say on a page only that their work is done."""
    config = Config({"HTMLExporter": {"embed_images": True}})
    resources = {"metadata": {"path": str(notebook.parent), "name": notebook.stem}}
    page = HTMLExporter(config=config).from_notebook_node(_without_bars(node), resources=resources)[0]
    return page.replace("</head>", f"<style>{_STYLE}</style></head>", 1)


def _without_bars(node: Any) -> Any:
    node = copy.deepcopy(node)
    for cell in node.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                lines = _BAR.sub("", output.text).splitlines(keepends=True)
                output.text = "".join(line for line in lines if line.strip())
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" or output.text]
    return node
