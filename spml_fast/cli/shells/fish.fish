# The shell that every system has answers, for fish has no functions of POSIX sh; the program is too long for an argument.
function __spml_fast_complete
    set -l words (commandline -opc)
    printf '%s\n' $__spml_fast_program | sh -s -- $words[2..-1] (commandline -ct)
end
complete -c spml-fast -f -a '(__spml_fast_complete)'
