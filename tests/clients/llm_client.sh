#!/usr/bin/env bash
# llm against a server, streamed and whole: llm_client.sh URL LLM
set -euo pipefail
LLM_USER_PATH=$(mktemp -d)
export LLM_USER_PATH
trap 'rm -rf "$LLM_USER_PATH"' EXIT
for kind in chat text; do
    printf -- '- model_id: %s\n  model_name: smollm2\n  api_base: %s/v1\n  completion: %s\n' \
        "$kind" "$1" "$([ "$kind" = text ] && echo true || echo false)"
done > "$LLM_USER_PATH/extra-openai-models.yaml"
ask() { "$2" -m "$1" --key none -o temperature 0 -o max_tokens 12 "${@:3}" < /dev/null; }
for more in "" --no-stream; do
    # shellcheck disable=SC2086
    ask chat "$2" $more "What is the capital of France?" | grep Paris
    # shellcheck disable=SC2086
    ask text "$2" $more "The capital of France is" | grep Paris
done
echo "llm: chat and text, streamed and whole"
