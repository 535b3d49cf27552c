"""Where a library's prefixes are: on the device, in CPU memory, or in a mapped file, within a budget.

sizes.py says how many bytes something takes before it is made; forms.py is how a prefix's numbers are held;
files.py are the mapped files; accounts.py counts bytes; held.py is one task; holdings.py decides who goes where.
"""
