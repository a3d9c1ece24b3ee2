"""The letters of pictures: the only place that draws them, five dots wide and nine high."""

from __future__ import annotations

from functools import cache

WIDTH, HEIGHT, BASE = 5, 9, 7  # the lowest two rows are below the base line

# Ten letters a block, six columns each; what is not here is drawn as a box.
_ART = (
    (
        "0123456789",
        """
 ###    #    ###   ###     #  #####   ##  #####  ###   ###
#   #  ##   #   # #   #   ##  #      #        # #   # #   #
#  ##   #       #     #  # #  #     #        #  #   # #   #
# # #   #      #    ##  #  #  ####  ####    #    ###   ####
##  #   #     #       # #####     # #   #  #    #   #     #
#   #   #    #    #   #    #  #   # #   #  #    #   #    #
 ###   ###  #####  ###     #   ###   ###   #     ###   ##
""",
    ),
    (
        "ABCDEFGHIJ",
        """
 ###  ####   ###  ####  ##### #####  ###  #   #  ###    ###
#   # #   # #   # #   # #     #     #   # #   #   #      #
#   # #   # #     #   # #     #     #     #   #   #      #
##### ####  #     #   # ####  ####  # ### #####   #      #
#   # #   # #     #   # #     #     #   # #   #   #      #
#   # #   # #   # #   # #     #     #   # #   #   #   #  #
#   # ####   ###  ####  ##### #      #### #   #  ###   ##
""",
    ),
    (
        "KLMNOPQRST",
        """
#   # #     #   # #   #  ###  ####   ###  ####   #### #####
#  #  #     ## ## ##  # #   # #   # #   # #   # #       #
# #   #     # # # # # # #   # #   # #   # #   # #       #
##    #     # # # #  ## #   # ####  #   # ####   ###    #
# #   #     #   # #   # #   # #     # # # # #       #   #
#  #  #     #   # #   # #   # #     #  #  #  #      #   #
#   # ##### #   # #   #  ###  #      ## # #   # ####    #
""",
    ),
    (
        "UVWXYZ.,:-",
        """
#   # #   # #   # #   # #   # #####
#   # #   # #   # #   # #   #     #
#   # #   # #   #  # #   # #     #               ##
#   # #   # # # #   #     #     #                ##   #####
#   # #   # # # #  # #    #    #
#   #  # #  ## ## #   #   #   #      ##    ##    ##
 ###    #   #   # #   #   #   #####  ##    ##    ##
                                            #
                                           #
""",
    ),
    (
        "abcdefghij",
        """
      #               #         ##        #       #      #
      #               #        #          #
 ###  # ##   ###   ## #  ###  ####   #### # ##   ##     ##
    # ##  # #   # #  ## #   #  #    #   # ##  #   #      #
 #### #   # #     #   # #####  #    #   # #   #   #      #
#   # #   # #   # #   # #      #    #   # #   #   #      #
 #### ####   ###   ####  ###   #     #### #   #  ###     #
                                        #             #  #
                                     ###               ##
""",
    ),
    (
        "klmnopqrst",
        """
#      ##                                              #
#       #                                              #
#  #    #   ## #  # ##   ###  # ##   ## # # ##   #### ####
# #     #   # # # ##  # #   # ##  # #  ## ##  # #      #
##      #   # # # #   # #   # #   # #   # #      ###   #
# #     #   # # # #   # #   # #   # #   # #         #  #  #
#  #   ###  # # # #   #  ###  ####   #### #     ####    ##
                              #         #
                              #         #
""",
    ),
    (
        "uvwxyz/%_+",
        """
                                        # ##  #
                                        # ## #
#   # #   # #   # #   # #   # #####    #     #          #
#   # #   # #   #  # #  #   #    #     #    #           #
#   # #   # # # #   #   #   #   #     #    #          #####
#  ##  # #  # # #  # #  #   #  #     #     # ##         #
 ## #   #    # #  #   #  #### #####  #    #  ##         #
                            #
                         ###                    #####
""",
    ),
)
_UNKNOWN = ("#####", *("#   #",) * 5, "#####")


@cache
def dots(letter: str) -> frozenset[tuple[int, int]]:
    """Where *letter* is black: column and row, from the top left."""
    rows = next((_rows(art, names.index(letter)) for names, art in _ART if letter in names), None)
    rows = () if letter == " " else rows or _UNKNOWN
    return frozenset(
        (x, y) for y, row in enumerate(rows) for x, dot in enumerate(row) if dot == "#"
    )


def _rows(art: str, index: int) -> tuple[str, ...]:
    start = index * (WIDTH + 1)
    return tuple(line[start : start + WIDTH] for line in art.strip("\n").split("\n"))
