_spml_fast_complete() {
    local line name
    local -a plain described folders
    while IFS= read -r line; do
        name=${line%%$'\t'*}
        case $line in
        */) folders+=("$line") ;;
        *$'\t'*) described+=("${name//:/\\:}:${line#*$'\t'}") ;;
        *) plain+=("$name") ;;
        esac
    done < <(_spml_fast "${(@Q)words[2,CURRENT]}")
    if (( $#described )); then _describe spml-fast described; fi
    if (( $#plain )); then compadd -- "${plain[@]}"; fi
    if (( $#folders )); then compadd -S '' -- "${folders[@]}"; fi
}
# A file of $fpath runs the function at once; a file that is sourced registers it.
if [ "${funcstack[1]-}" = _spml-fast ]; then
    _spml_fast_complete "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -D; }
    compdef _spml_fast_complete spml-fast
fi
