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
perplexity() { sweep --perplexity "$data/wikitext2/wiki.valid.raw" --generate 128 --sequences 16 "$@"; }
tasks() { sweep --data "$data" --limit 200 --batch-size 8 --batch per_sequence "$@"; }
choices=copa,piqa,arc_easy,arc_challenge,boolq,hellaswag
answers=coqa,xsum,cnn_dailymail

sweep --methods topk,dynamic+topk,magnitude --speed --examples
perplexity --methods topk,dynamic+topk --flocking --prompt 64,256,1024
perplexity --methods topk_sample,sample,magnitude,random,wanda --densities 0.5 --prompt 64,256,1024
tasks --methods topk --tasks "$choices,$answers"
tasks --methods dynamic+topk --densities 0.5 --tasks "$choices,$answers"
tasks --methods topk --tasks qasper --max-length 2048
tasks --methods dynamic+topk --densities 0.5 --tasks qasper --max-length 2048
tasks --methods magnitude --densities 0.5 --tasks copa,piqa,arc_easy
tasks --methods topk --densities 0.5 --batch shared --tasks copa,piqa,arc_easy
tasks --methods topk --densities 0.5 --phase last_token --tasks copa,piqa,arc_easy
tasks --methods topk --tasks gsm8k
# More than the window of OPT, for one.
perplexity --methods topk,dynamic+topk --prompt 64,256,1024,4096 || echo "no perplexity after 4,096 tokens, see above" >&2
# What benchmarks/ablation.py and benchmarks/loss.py have measured of the model, if they have, goes onto the page, too.
mkdir -p "$folder/equal_bytes"
find results/ablation results/loss -name "$model-*.csv" -exec sh -c 'cp "$1" "$2/$(basename "$(dirname "$1")")-$(basename "$1")"' _ {} "$folder/equal_bytes" \;
griffin report "$folder" --without-text
