#!/usr/bin/env bash
# A picture of a report's first screen, by headless Chromium: scripts/picture.sh REPORT.html OUT.png [WIDTH,HEIGHT]
set -euo pipefail
report=$(realpath "$1")
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars --user-data-dir="$profile" \
  --window-size="${3:-1120,1440}" --screenshot="$(realpath -m "$2")" "file://$report" 2>/dev/null
