#!/bin/bash
# Grow the context in stages: one job per stage, each beginning with the weights of the one before.
#
#     launch/slurm/stages.sh --nodes 8 -- configs/8k.yaml configs/32k.yaml configs/128k.yaml
#
# What stands before `--` goes to sbatch. Stage k trains in runs/stage-k of its own; a short job after
# it exports the weights to runs/stage-k/export, which the next stage loads as model.checkpoint. A
# stage that is requeued goes on with itself; one that fails leaves the later ones unstarted
# (DependencyNeverSatisfied: `squeue -t PD`), and once it is repaired the same command goes on: stages
# that are done return at once.
set -euo pipefail

options=()
while (($#)) && [[ "$1" != -- ]]; do
  options+=("$1")
  shift
done
shift || { echo "usage: stages.sh [SBATCH OPTION...] -- STAGE.yaml..." >&2; exit 2; }
# Another root where several chains live side by side.
root="${STAGES:-runs}"
script="$(dirname "$0")/${STAGES_SCRIPT:-ranks.sbatch}"

after=()
weights=()
stage=0
for config in "$@"; do
  stage=$((stage + 1))
  run="$root/stage-$stage"
  job=$(sbatch --parsable "${after[@]}" --kill-on-invalid-dep=yes --job-name="stage-$stage" \
    "${options[@]}" "$script" --cfg "$config" --set "run.dir=$run" "${weights[@]}")
  export=$(sbatch --parsable --dependency="afterok:$job" --kill-on-invalid-dep=yes \
    --output=%x-%j.out "${options[@]}" \
    --job-name="export-$stage" --nodes=1 --ntasks=1 --ntasks-per-node=1 --gpus-per-node=0 \
    --wrap="PATH=\$PWD/.venv/bin:\$PATH; test -d $run/export || dist-attn export --run $run --out $run/export")
  echo "stage $stage: job $job trains $config in $run, job $export exports its weights"
  after=(--dependency="afterok:$export")
  weights=(--set "model.checkpoint=$run/export")
done
