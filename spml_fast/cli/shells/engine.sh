# What can stand at the cursor: _spml_fast WORD ... CURSOR prints a candidate a line, with a tab and its help behind it;
# names of files end in a slash where they are folders to go on from. POSIX sh, shared by bash, zsh and fish.

# Lines of $1 for which the test $2 holds, as folders: what it holds for, and folders that lead further.
_spml_fast_folders() {
    case $2 in '~/'*) set -- "$1" "$HOME/${2#??}" ;; esac
    for _spml_fast_path in "$2"*/; do
        [ -d "$_spml_fast_path" ] || continue
        if [ -n "$1" ] && [ -e "$_spml_fast_path$1" ]; then
            printf '%s\n' "${_spml_fast_path%/}"
        else
            printf '%s\n' "$_spml_fast_path"
        fi
    done
}

_spml_fast_files() {
    case $1 in '~/'*) set -- "$HOME/${1#??}" ;; esac
    for _spml_fast_path in "$1"*; do
        if [ -d "$_spml_fast_path" ]; then
            printf '%s/\n' "$_spml_fast_path"
        elif [ -e "$_spml_fast_path" ]; then
            printf '%s\n' "$_spml_fast_path"
        fi
    done
}

# What a line of the tables stands for.
_spml_fast_show() {
    case $1 in
    @run) _spml_fast_folders "$_spml_fast_run_mark" "$2" ;;
    @manifest) _spml_fast_folders "$_spml_fast_manifest_mark" "$2" ;;
    @folder) _spml_fast_folders '' "$2" ;;
    @file) _spml_fast_files "$2" ;;
    @*) ;;
    *) case $1 in "$2"*) printf '%s\n' "$1" ;; esac ;;
    esac
}

# The value of the last of the options $2 and $3 on the command line of $4 ..., or $1.
_spml_fast_chosen() {
    _spml_fast_found=$1 _spml_fast_long=$2 _spml_fast_short=$3
    shift 3
    while [ $# -gt 1 ]; do
        case $1 in
        "$_spml_fast_long" | "$_spml_fast_short") _spml_fast_found=$2 ;;
        "$_spml_fast_long"=* | "$_spml_fast_short"=*) _spml_fast_found=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$_spml_fast_found"
}

# Tables whose options the command $1 has; $2 ... are the words after it.
_spml_fast_contexts() {
    _spml_fast_name=$1
    shift
    case $_spml_fast_name in
    prepare)
        # A data set has all of its options in one table.
        while [ $# -gt 1 ]; do
            case $1 in -*) ;; *) printf 'prepare/%s\n' "$1" && return ;; esac
            shift
        done
        ;;
    esac
    printf '%s\n' "$_spml_fast_name"
    case $_spml_fast_name in
    train | reproduce)
        [ "$_spml_fast_name" = reproduce ] && printf 'train\n'
        printf 'method/%s\n' "$(_spml_fast_chosen "$_spml_fast_method" --method.name --method "$@")"
        printf 'head/%s\n' "$(_spml_fast_chosen "$_spml_fast_head" --model.head --model.head "$@")"
        ;;
    esac
}

_spml_fast() (
    if [ -n "${ZSH_VERSION:-}" ]; then emulate -L sh; fi
    _spml_fast_command=
    while [ $# -gt 1 ]; do
        case $1 in
        --plugins) shift; [ $# -gt 1 ] && shift ;;
        --*) shift ;;
        *) _spml_fast_command=$1; shift; break ;;
        esac
    done
    if [ -z "$_spml_fast_command" ]; then
        _spml_fast_table '' | while IFS= read -r _spml_fast_line; do _spml_fast_show "$_spml_fast_line" "$1"; done
        return
    fi
    _spml_fast_all=$(_spml_fast_contexts "$_spml_fast_command" "$@")
    _spml_fast_previous=
    while [ $# -gt 1 ]; do _spml_fast_previous=$1; shift; done
    _spml_fast_lead=
    _spml_fast_cursor=$1
    case $1 in
    --*=*)
        _spml_fast_previous=${1%%=*} _spml_fast_lead=${1%%=*}= _spml_fast_cursor=${1#*=}
        ;;
    esac
    # A word is either the value of the option before it, an option, or an argument.
    _spml_fast_wanted=arguments
    case $_spml_fast_previous in
    --*)
        for _spml_fast_context in $(printf '%s ' $_spml_fast_all); do
            _spml_fast_values=$(_spml_fast_table "$_spml_fast_context $_spml_fast_previous")
            case $_spml_fast_values in '' | @flag) ;; *) _spml_fast_wanted=value; break ;; esac
        done
        ;;
    esac
    if [ "$_spml_fast_wanted" = value ]; then
        printf '%s\n' "$_spml_fast_values" | while IFS= read -r _spml_fast_line; do
            _spml_fast_show "$_spml_fast_line" "$_spml_fast_cursor" | while IFS= read -r _spml_fast_path; do
                printf '%s%s\n' "$_spml_fast_lead" "$_spml_fast_path"
            done
        done
        return
    fi
    case $1 in -*) _spml_fast_kinds=options ;; *) _spml_fast_kinds=arguments ;; esac
    for _spml_fast_context in $(printf '%s ' $_spml_fast_all); do
        _spml_fast_table "$_spml_fast_context $_spml_fast_kinds" | while IFS= read -r _spml_fast_line; do
            _spml_fast_show "$_spml_fast_line" "$1"
        done
    done
)
