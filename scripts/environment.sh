# Sourced by the other scripts: finds a Python >= 3.11, makes the virtual environment once, reuses it afterwards.
#   make_environment DIRECTORY EXTRAS [PYTHON] [FURTHER PACKAGES...]

find_python() {  # prints the newest of the given versions that really runs
  local version candidate
  for version in "$@"; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/"python$version"; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        command -v "$candidate"
        return 0
      fi
    done
  done
  return 1
}

make_environment() {
  local directory=$1 extras=$2 python=${3:-} further=("${@:4}") stamp
  [ -n "$python" ] || python=$(find_python 3 3.13 3.12 3.11) || {
    echo "This needs Python >= 3.11; none was found." >&2
    return 1
  }
  stamp=$(cat pyproject.toml setup.cfg | cksum)-$extras${further[*]:+ ${further[*]}}
  if [ "$(cat "$directory/.installed" 2>/dev/null)" != "$stamp" ]; then
    "$python" -m venv --clear "$directory"
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" \
      ${further[@]+"${further[@]}"}
    printf '%s' "$stamp" > "$directory/.installed"
  fi
}
