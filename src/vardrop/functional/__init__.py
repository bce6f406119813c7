from vardrop.functional.gaussian import *
