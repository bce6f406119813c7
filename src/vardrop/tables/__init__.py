"""The result tables of the papers: recipes as data, a runner, and the tables with ours beside theirs."""

from vardrop.tables.recipes import Cell as Cell
from vardrop.tables.recipes import Row as Row
from vardrop.tables.recipes import Run as Run
from vardrop.tables.recipes import Table as Table
from vardrop.tables.recipes import find_run as find_run
from vardrop.tables.recipes import load_tables as load_tables
from vardrop.tables.store import Found as Found
from vardrop.tables.store import found_in as found_in
from vardrop.tables.store import stored_in as stored_in
