#!/usr/bin/env bash
# From nothing to a chat: data, pretraining, evaluation, fine-tuning, problems, a question, and a report of all this.
#
# bash extras/speedrun.sh tiny       a quarter of an hour on two CPU cores, no network
# bash extras/speedrun.sh pretrain   the paper's model, on one A100 80GB; on eight GPUs, with this before it:
#                                    LAUNCH="torchrun --nproc_per_node=8 --shutdown_timeout=600"
#
# Further arguments are passed to train.py and sft.py. The plots need matplotlib, which requirements-dev.txt installs.
# If the script is stopped or killed, run it again. It skips the stages that are complete and resumes the others. To
# start over, delete the folders of the runs and of the report under out/.
set -euo pipefail
cd "$(dirname "$0")/.."

base=${1:-}
case "$base" in
tiny) chat=tiny_sft question="Ada has 52 stamps and loses 17. How many are left?" ;;
pretrain) chat=sft question="What is the sum of the first 100 odd numbers?" ;;
*)
    echo "usage: bash extras/speedrun.sh tiny | pretrain" >&2
    exit 1
    ;;
esac
flags=(--resume "${@:2}") # start, or go on; a training that is stopped fails
report=out/${base}_report
mkdir -p "$report"

# Run a command, unless an earlier start has completed this stage, and note how many seconds it took.
stage() {
    if grep -qs "^$1	" "$report/times.tsv"; then return; fi
    echo "== $1: ${*:2}"
    local started=$SECONDS
    "${@:2}"
    printf '%s\t%s\n' "$1" $((SECONDS - started)) >>"$report/times.tsv"
}

stage "data" python prepare_data.py "$base"
stage "pretraining" ${LAUNCH:-python} train.py "config/$base.py" "${flags[@]}"
stage "evaluation" python eval.py "out/$base"
stage "chat data" python prepare_data.py "$chat"
# Each process needs a micro-batch of its own. With one row in each, the 14 rows of a step serve up to 14 processes.
stage "fine-tuning" ${LAUNCH:-python} sft.py "config/$chat.py" ${LAUNCH:+--micro_batch_size=1} "${flags[@]}"
stage "problems" python eval.py "out/$chat" --report --problems
python sample.py "out/$base" --max_new_tokens=300 >"$report/sample.txt"
python sample.py "out/$chat" --chat --temperature=0 --prompt="$question" >"$report/answer.txt"
cat "$report/answer.txt"
python -m extras.report --runs="out/$base,out/$chat" --question="$question" --out_dir="$report"
