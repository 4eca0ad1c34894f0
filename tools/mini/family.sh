#!/usr/bin/env bash
# Renders the mini family's training sets and trains its stages, from where the last run stopped.
#   tools/mini/family.sh render       the sets, one after the other
#   tools/mini/family.sh train        every stage in order, each for its minutes of CPU time
#   tools/mini/family.sh train vae    one stage, or several separated by commas
# Checkpoints, sets and the new weights lie under FAMILY; training begins with the weights in data/models.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${FAMILY:-outputs/family}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
mkdir -p "$work"

# One set: name, split, scenes, run.seed, size in px, paths per pixel. A finished set is left alone.
render() {
  "$python" build_data.py dataset=rendered tracking=none run.resume=true executor.workers=1 \
    run.dir="$work/$1" render.split="$2" render.count="$3" run.seed="$4" render.size="$5" render.samples="$6"
}

render_all() {
  render varied train 4000 100 256 5
  render varied-heldout heldout 300 100 256 8
  render large train 400 101 512 12
  render first train 4000 1 128 12
}

train() {
  local sets=(data/rendered/train) cutouts=()
  for name in varied first; do
    if [ -e "$work/$name/README.md" ]; then sets+=("$work/$name"); fi # the dataset card is written last
  done
  if [ -d "$work/cutouts" ]; then cutouts=(--cutouts "$work/cutouts"); fi
  "$python" -m tools.mini --stage "$1" --start data/models --out "$work/models" --work "$work/work" \
    --train "${sets[@]}" "${cutouts[@]}" --decoder-only --threads "$OMP_NUM_THREADS" --minutes "$MINUTES"
}

# Minutes of CPU time for each stage, 40 hours in all.
MINUTES=${MINUTES:-matting=480,vae=240,clip=240,unet=900,florence2=240,mllama=240,judge=90}
STAGES=matting,judge,vae,clip,unet,florence2,mllama
case "${1:-all}" in
  render) render_all ;;
  train) train "${2:-$STAGES}" ;;
  all) render_all && train "$STAGES" ;;
  *) echo "usage: $0 [render | train [STAGES]]" >&2; exit 2 ;;
esac
