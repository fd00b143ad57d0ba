#!/usr/bin/env bash
# Builds the documentation site, and stops at the first warning: a link, an anchor or a page that isn't there.
#
#   bash scripts/docs.sh              writes it to site/
#   bash scripts/docs.sh serve        shows it at http://127.0.0.1:8000 and follows changes
#
# What may be set in the environment: see common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment docs
export NO_MKDOCS_2_WARNING=1  # an advertisement, not a warning
command=${1:-build}
exec "$venv/bin/mkdocs" "$command" --strict "${@:2}"
