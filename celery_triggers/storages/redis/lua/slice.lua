-- Shared by all scripts: reading a slice of a session.
--
-- KEYS[1]  hash    v '<incarnation> <version>', m head, i:<instance> rows, entries by key
-- KEYS[2]  zset    <trigger length>:<trigger>:<number, 10 digits>:<task>, all of score 0
-- KEYS[3]  string  what came of the change with this made-up event id
-- KEYS[4]  zset    due dates of the shard: <uid length>:<uid><instance or ''>, by milliseconds
-- ARGV[1]  JSON: what is asked for, {whole, [entries], [instances], [trigger prefixes]}

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function collect(found, key)
  local value = redis.call('HGET', KEYS[1], key)
  if value then
    found[#found + 1] = key
    found[#found + 1] = value
  end
end

local function collect_waiting(found, waiting, prefix)
  local members = redis.call('ZRANGEBYLEX', KEYS[2], '[' .. prefix, '(' .. prefix .. '\255')
  for _, member in ipairs(members) do
    waiting[#waiting + 1] = member
    local number = tonumber(string.sub(member, #prefix + 1, #prefix + 10))
    local task = string.sub(member, #prefix + 12)
    collect(found, 'i:' .. task .. '#' .. string.format('%d', number))
  end
end

-- Return JSON: {time, version or '', head, [key, value, ...], [waiting members], passing}.
local function slice(request)
  local head = redis.call('HMGET', KEYS[1], 'v', 'm')
  local found, waiting = {}, {}
  if request[1] then
    found = redis.call('HGETALL', KEYS[1])
    waiting = redis.call('ZRANGE', KEYS[2], 0, -1)
  elseif head[1] then
    for _, entry in ipairs(request[2]) do collect(found, entry) end
    for _, name in ipairs(request[3]) do collect(found, 'i:' .. name) end
    for _, prefix in ipairs(request[4]) do collect_waiting(found, waiting, prefix) end
  end
  return cjson.encode({
    string.format('%d', now_ms()), head[1] or '', head[2] or '', found, waiting,
    redis.call('GET', KEYS[3]) or '',
  })
end

-- Set the due date of an instance, or of the session where name is ''; 0 removes it.
local function set_due(key, owner, name, at)
  if at > 0 then
    redis.call('ZADD', key, at, owner .. name)
  else
    redis.call('ZREM', key, owner .. name)
  end
end
