# Sourced: programs in the background, known by STATE/$pids/NAME, which holds "ID START" (an id alone may be another
# process by now) and by STATE/logs/NAME.log. Wants `state` and `pids` to be set.

set -E
trap 'printf "cluster: %s, line %s: failed: %s\n" "${BASH_SOURCE[0]}" "$LINENO" "$BASH_COMMAND" >&2' ERR

die() { printf 'cluster: %s\n' "$*" >&2; exit 1; }

# start_time ID: in the kernel's ticks; fails where no such process runs.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) } # the name before it, in parentheses, may have spaces
    [ "${stat:0:1}" != Z ] && cut -d' ' -f20 <<<"$stat"
}

# note NAME ID
note() { echo "$2 $(start_time "$2" || echo ended)" > "$state/$pids/$1"; }

# is_running FILE
is_running() {
    local id start
    read -r id start < "$1" && [ "$(start_time "$id" || true)" = "$start" ]
}

# start NAME COMMAND...: with tied=yes, the program dies with this script, whatever ends it.
start() {
    local name=$1 tie=()
    shift
    [ "${tied:-no}" = no ] || tie=(setpriv --pdeathsig KILL)
    nohup "${tie[@]}" "$@" > "$state/logs/$name.log" 2>&1 < /dev/null &
    note "$name" $!
    disown # else bash reports its end
}

# running: ids of those that run, but not of the caller.
running() {
    local file id
    for file in "$state/$pids"/*; do
        if [ -e "$file" ] && is_running "$file"; then
            id=$(cut -d' ' -f1 "$file")
            [ "$id" = $$ ] || echo "$id"
        fi
    done
}

# stop_all: at once, as all that the programs hold is thrown away. Returns when they are gone.
stop_all() {
    local ids
    while ids=$(running) && [ -n "$ids" ]; do
        kill -KILL $ids 2>/dev/null || true # one may have ended meanwhile
        sleep 0.05
    done
}

# await WHAT COMMAND...: until it succeeds, unless a program ends. All is there within seconds on an idle machine; the limit
# is for one that has much else to do.
await() {
    local what=$1 deadline=$((SECONDS + 300)) file
    shift
    until "$@" >/dev/null 2>&1; do
        for file in "$state/$pids"/*; do is_running "$file" || show_logs "$(basename "$file") has ended"; done
        if [ "${tied:-no}" = yes ] && read -r -t 0; then exit 1; fi # the input has ended: nobody waits for this any more
        [ $SECONDS -lt $deadline ] || show_logs "$what is not ready after 300 s"
        sleep 0.1
    done
}

# show_logs MESSAGE: and ends the script.
show_logs() {
    printf 'cluster: %s; the end of each log:\n' "$1" >&2
    tail -n 8 "$state"/logs/*.log >&2 || true
    exit 1
}
