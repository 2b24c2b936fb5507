return slice(cjson.decode(ARGV[1]))
