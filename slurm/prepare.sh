#!/usr/bin/env bash
# Make what a run needs from the internet: the environment, and the data of a built-in recipe.
#
#   bash slurm/prepare.sh [CONFIG] [key=value ...]
#
# For a login node, before sbatch; slurm/pretrain.sh calls it by itself where there is no Slurm. What exists is left
# alone, and two that run at once wait for each other. Exit code 2: the config cannot run, or data are missing
# that no recipe makes.

set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/common.sh
source "$project/slurm/common.sh"
find_config "$@"
cd "$project"
if ! find_python; then
    make --no-print-directory env
fi

prepare_data() {
    local facts root recipe missing
    missing=$(plan --missing 2>/dev/null)
    if [[ -z "$missing" ]]; then
        return
    fi
    facts=$(plan --show data.root --show data.recipe 2>/dev/null)
    root=$(sed -n 1p <<<"$facts")
    recipe=$(sed -n 2p <<<"$facts")
    if [[ "$recipe" != demo ]]; then
        echo "data.root must hold every data set of data.sources, got none at $(head -n 1 <<<"$missing");" \
            "prepare it with data_prep, or change data.root" >&2
        exit 2
    fi
    "$python" -m data_prep.demo --out "$root" --cache "${MATFORMER_CACHE:-cache}"
}

plan --check
mkdir -p cache
exec 9>cache/.prepare.lock # not cache/.lock: that is what data_prep.fetch, called below, waits for
if command -v flock >/dev/null; then flock 9; fi
prepare_data
