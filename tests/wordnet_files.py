"""A WordNet of a few words in the format of its database files."""

_LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
INDEX = {
  # word, part, sets, pointers and their symbols, sets again, tagged ones, offsets
  "noun": ("auto n 1 2 @ ~ 1 0 00000010", "automobile n 1 2 @ ~ 1 1 00000010",
           "bank n 2 0 2 1 00000020 00000030", "church n 1 1 @ 1 1 00000050",
           "depository_financial_institution n 1 0 1 0 00000020", "goose n 1 1 @ 1 1 00000060",
           "kirk n 1 1 @ 1 1 00000050", "run n 1 0 1 0 00000070", "shore n 1 0 1 1 00000030",
           "twit n 1 0 1 1 00000060", "woman n 1 0 1 1 00000080"),
  "verb": ("bank v 1 0 1 0 00000010", "go v 1 0 1 1 00000040", "run v 1 1 ~ 1 1 00000040",
           "tip v 1 0 1 0 00000010"),
  "adj": ("big a 1 1 & 1 1 00000010", "large a 1 1 & 1 1 00000010"),
  "adv": ("well r 1 0 1 1 00000010",),
}
EXCEPTIONS = {
  "noun": ("geese goose",), "verb": ("ran run", "went go"), "adj": ("bigger big",),
  "adv": ("best well",),
}


def write(folder):
  """Writes them into a folder, which is given back."""
  folder.mkdir(parents=True, exist_ok=True)
  for part, lines in INDEX.items():
    (folder / f"index.{part}").write_text(_LICENCE + "".join(f"{line}  \n" for line in lines))
    (folder / f"{part}.exc").write_text("".join(f"{line}\n" for line in EXCEPTIONS[part]))
  return folder
