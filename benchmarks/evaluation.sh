#!/usr/bin/env bash
# The evaluation of a model that results/evaluation holds: everything that griffin sweep measures, and the report.
# Can be stopped and started again at any time.
#
#     benchmarks/evaluation.sh MODEL DATA FOLDER [FLAGS of the model ...]
#
# results/evaluation is of `--dtype f32`.
set -euo pipefail
model=$1 data=$2 folder=$3
flags=("${@:4}")

sweep() { griffin sweep -m "$model" "${flags[@]}" --densities 1.0,0.75,0.5 -o "$folder" "$@"; }
tasks() { sweep --data "$data" --limit 200 --batch-size 8 --batch per_sequence "$@"; }

sweep --methods topk,tier+topk,magnitude --speed --examples
sweep --methods topk,tier+topk,topk_sample,sample,magnitude,random,wanda --flocking \
  --perplexity "$data/wikitext2/wiki.valid.raw" --prompt 64,256,1024 --generate 128 --sequences 16
tasks --methods topk --tasks copa,piqa,arc_easy,arc_challenge,boolq,hellaswag
tasks --methods magnitude,tier+topk --densities 0.5 --tasks copa,piqa,arc_easy
tasks --methods topk,tier+topk --tasks coqa
tasks --methods topk --tasks xsum,cnn_dailymail
tasks --methods topk --tasks qasper --max-length 2048
tasks --methods topk --tasks gsm8k
# What benchmarks/ablation.py and benchmarks/loss.py have measured of the model, if they have, goes onto the page, too.
mkdir -p "$folder/equal_bytes"
find results/ablation results/loss -name "$model-*.csv" -exec sh -c 'cp "$1" "$2/$(basename "$(dirname "$1")")-$(basename "$1")"' _ {} "$folder/equal_bytes" \;
griffin report "$folder" --without-text
