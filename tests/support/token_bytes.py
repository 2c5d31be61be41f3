"""What tokens hold of a text, by a walk over their bytes."""

import functools


def byte_values():
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in plain]
    return {chr(x): x for x in plain} | {chr(256 + i): x for i, x in enumerate(others)}


BYTES = byte_values()


@functools.cache
def bytes_of(tokenizer):
    """The bytes that each token says."""
    added, blank = tokenizer.added_tokens_decoder, "▁" in tokenizer.get_vocab()

    def of(token_id):
        token = tokenizer.convert_ids_to_tokens(int(token_id))
        if blank or token_id in added:
            return token.replace("▁", " ").encode()
        return bytes(BYTES[x] for x in token)

    return of


def characters_held(response, text):
    """Of each token the numbers of the characters of the text that it holds a byte of."""
    of, held = bytes_of(response.tokenizer), []
    before, own = [[of(x) for x in ids] for ids in (response.prompt_ids, response.ids)]
    # the answer is the last thing that is said but for what ends the turn
    place = len(b"".join(before)) - b"".join([*before, *own]).rindex(text.encode())
    of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    for piece in own:
        inside = range(max(0, place), min(len(of_byte), place + len(piece)))
        held.append({of_byte[k] for k in inside})
        place += len(piece)
    return held
