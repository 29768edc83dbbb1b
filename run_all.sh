#!/usr/bin/env bash
# MeteoRA, from a clean clone to tables and figures. See ./run_all.sh --help.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: ./run_all.sh [--profile NAME] [--from NN | --only NN] [--fresh] [--dry-run]
       ./run_all.sh test [PYTEST OPTIONS]
       ./run_all.sh lab [JUPYTERLAB OPTIONS]

Makes the Python environment (.venv, pinned) if there is none, then runs the notebooks in order. Notebooks whose inputs
have not changed since their last run are skipped, so that the same command also goes on after an interruption.

  --profile NAME   what to run: laptop (default), smollm2, llama3-8b, llama2-13b, smoke, or a .yaml file of your own
  --from NN        begin with this notebook, such as 02
  --only NN        run this notebook alone
  --fresh          forget what earlier runs of these notebooks left
  --dry-run        say what would be done and downloaded, and what it takes; start nothing
  test             the same environment, then the test suite
  lab              the same environment, then JupyterLab on notebooks/

Results are written to results/NAME/, intermediate files to artifacts/NAME/, downloads are kept in ~/.cache/meteora.
TEXT
}

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit "${status:-1}"; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and none was found; install one and run this again."
}

# The environment is complete when .venv holds a stamp of what it was made from: the pins, the package's own
# dependencies, and the place of this clone (the package is installed editable).
pins_hash() { { cat constraints.txt pyproject.toml; pwd; } | sha256sum | cut -d' ' -f1; }
stamp=.venv/.meteora-pins
environment_is_ready() { [[ -x .venv/bin/python && -f $stamp && "$(cat "$stamp")" == "$(pins_hash)" ]]; }

set_up() {
    if environment_is_ready; then
        say "== environment: .venv is up to date"
        return
    fi
    local begin=$SECONDS python log
    say "== environment: installing the pinned packages into .venv (only this once; several minutes)"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        "$python" -m venv .venv || fail "making .venv failed, see above (on Debian and Ubuntu, install python3-venv)."
    fi
    rm -f "$stamp"
    log=.venv/install.log
    # setuptools, which builds the editable package, is pinned and installed with the rest.
    if ! { .venv/bin/python -m pip install --progress-bar off -c constraints.txt setuptools &&
           .venv/bin/python -m pip install --progress-bar off -c constraints.txt --no-build-isolation \
               -e '.[notebooks,test]'; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        fail "installing the packages failed (full log: $PWD/$log); check network and disk space, then run this again."
    fi
    pins_hash >"$stamp"
    say "   done in $((SECONDS - begin)) s"
}

run_tests() {
    local workers
    workers=$(nproc 2>/dev/null || echo 1)
    say "== tests"
    # the tests of one file share fixtures, and the notebooks' build on each other: a file stays in one process
    exec .venv/bin/pytest -n "$((workers < 4 ? workers : 4))" --dist loadfile "$@"
}

run_notebooks() {
    local option value profile=laptop dry_run=no arguments=()
    while (($#)); do
        option=$1
        case "$option" in
            --profile | --from | --only)
                (($# > 1)) || status=2 fail "$option needs a value; see ./run_all.sh --help."
                value=$2
                if [[ $option == --profile ]]; then
                    [[ $value != *.y*ml || ! -f $called_from/$value ]] || value=$called_from/$value
                    profile=$value
                fi
                arguments+=("$option" "$value"); shift 2 ;;
            -h | --help) usage; return ;;
            --fresh) arguments+=("$option"); shift ;;
            --dry-run) dry_run=yes; arguments+=("$option"); shift ;;
            *) status=2 fail "unknown argument '$option'; see ./run_all.sh --help." ;;
        esac
    done
    local file="notebooks/profiles/$profile.yaml"
    [[ $profile != *.y*ml ]] || file=$profile
    [[ -f $file ]] || status=2 fail "there is no profile '$profile'; choose one of: $(profiles)."
    if [[ $dry_run == yes ]] && ! environment_is_ready; then
        say "== environment: would install $(grep -c == constraints.txt) pinned packages into .venv (1 to 6 GB)"
        say "== profile $file, of which the environment is needed to say more:"
        grep -E '^(description|model|needs):' "$file" | sed 's/^/   /'
        return
    fi
    set_up
    say "== notebooks"
    exec .venv/bin/meteora-study "${arguments[@]}"
}

profiles() { find notebooks/profiles -name '*.yaml' -exec basename {} .yaml \; | sort | paste -sd' '; }

case "${1:-}" in
    -h | --help) usage ;;
    test) shift; set_up; run_tests "$@" ;;
    lab) shift; set_up; exec .venv/bin/jupyter lab --notebook-dir=notebooks "$@" ;;
    *) run_notebooks "$@" ;;
esac
