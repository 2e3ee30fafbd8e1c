#!/bin/sh
# The API by hand. Settings, with what fits `make demo`: BASE_URL, API_KEY, MODEL, CONTROL.
set -eu
url="${BASE_URL:-http://localhost:8000}/v1/chat/completions"
model="${MODEL:-a}" control="${CONTROL:-manners}"

ask() { # the body's fields beside the question, then options for curl
  fields="$1"
  shift
  curl -sS --fail-with-body "$url" -H "Authorization: Bearer ${API_KEY:-none}" -H 'Content-Type: application/json' "$@" \
    -d "{\"messages\": [{\"role\": \"user\", \"content\": \"Where does Lukas live?\"}], \"max_tokens\": 60, $fields}"
  echo
}

ask "\"model\": \"$model\", \"control\": false"
ask "\"model\": \"$model\", \"control\": {\"name\": \"$control\", \"strength\": 0.7}"
ask "\"model\": \"$model\"" -H "X-Trimtab-Control: $control=0.7"
ask "\"model\": \"$model:$control=0.7\""
ask "\"model\": \"$model:$control=0.7\", \"stream\": true" -N
