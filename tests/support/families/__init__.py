"""Tiny random models of the image-text-to-text families, one builder each, with the peculiarities of real ones."""

from tests.support.families import axes, gemma, idefics, llava, qwen, tiles

BUILDERS = {
    **qwen.BUILDERS,
    **axes.BUILDERS,
    **llava.BUILDERS,
    **tiles.BUILDERS,
    **idefics.BUILDERS,
    **gemma.BUILDERS,
}
