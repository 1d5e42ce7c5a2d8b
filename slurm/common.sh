# shellcheck shell=bash
# What prepare.sh and pretrain.sh share; they source it once `project` is known.

# CONFIG as the caller sees it, else as the project does; the rest are overrides.
find_config() {
    config=configs/run/demo.yaml
    if (($#)) && [[ "$1" != *=* ]]; then
        config=$1
        shift
        if [[ -f "$config" ]]; then
            config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config")
        fi
    fi
    overrides=("$@")
}

# The interpreter; false where the project has none yet. From the project's folder.
find_python() {
    python=${MATFORMER_PYTHON:-$project/.venv/bin/python}
    [[ -n "${MATFORMER_PYTHON:-}" || -f .venv/.installed ]]
}

plan() { "$python" -m matformer.plan "$config" ${overrides[@]+"${overrides[@]}"} "$@"; }
