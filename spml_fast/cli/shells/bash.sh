_spml_fast_complete() {
    # bash makes words of its own at `=`: `--format=on` is three.
    local words=() word joined=0 line lead
    for word in "${COMP_WORDS[@]:1:COMP_CWORD}"; do
        if [[ ${#words[@]} -gt 0 && ( $word == = || $joined == 1 ) ]]; then
            words[${#words[@]} - 1]+=$word
        else
            words+=("$word")
        fi
        joined=$([[ $word == = ]] && echo 1 || echo 0)
    done
    # The word at the cursor comes as it was typed, with backslashes before blanks.
    words[${#words[@]} - 1]=${words[${#words[@]} - 1]//\\/}
    COMPREPLY=()
    lead=${words[${#words[@]} - 1]}
    [[ $lead == --*=* ]] && lead=${lead%%=*}= || lead=
    while IFS= read -r line; do
        line=${line%%$'\t'*}
        line=${line#"$lead"}
        if [[ $line == */ ]]; then compopt -o nospace 2>/dev/null; fi
        COMPREPLY+=("$(printf %q "$line")")
    done < <(_spml_fast "${words[@]}")
}
complete -F _spml_fast_complete spml-fast
