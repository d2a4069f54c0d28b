#!/usr/bin/env bash
# Write the patch series from a branch of torchtitan, one commit per patch on top of the tag `released`:
#     scripts/patches.sh [CHECKOUT [FOLDER]]
# CHECKOUT  git checkout of torchtitan (default: build/torchtitan; made from the installed package if it is missing)
# FOLDER    where the patches go (default: patches)
# PYTHON    a variable: Python of the environment with the installed package (default: .venv/bin/python)
# To change a patch: call this once, change the commits in CHECKOUT (git rebase -i released), call this again.
set -euo pipefail
[[ ${1:-} =~ ^(-h|--help)$ ]] && sed -n '2,/^set/s/^# //p' "$0" && exit
root=$(cd "$(dirname "$0")/.." && pwd)
checkout=${1:-$root/build/torchtitan} folder=${2:-$root/patches}
if [[ ! -d $checkout ]]; then
    python=${PYTHON:-$root/.venv/bin/python}
    mkdir -p "$checkout"
    installed=$(cd "$root" && "$python" -c 'from torchtitan_ext.patching import installed_root; print(installed_root())')
    cp -r "$installed/torchtitan" "$checkout/"
    find "$checkout" -name __pycache__ -prune -exec rm -rf {} +
    (cd "$root" && "$python" -m torchtitan_ext patch revert --root "$checkout")
    git -C "$checkout" init --quiet
    git -C "$checkout" add --all --force
    git -C "$checkout" -c user.name=torchtitan -c user.email=- commit --quiet --message "torchtitan 0.2.2"
    git -C "$checkout" tag released
    git -C "$checkout" -c user.name=lighthouse -c user.email=- am --quiet "$root"/patches/*.patch
    echo "$checkout has a commit for each patch: change them there, then call this again"
    exit
fi
new=$(mktemp -d)
git -C "$checkout" format-patch --quiet --no-numbered --zero-commit --no-signature --full-index \
    --output-directory "$new" released
mkdir -p "$folder"
rm -f "$folder"/*.patch    # now that the new ones are complete
mv "$new"/*.patch "$folder"
rmdir "$new"
