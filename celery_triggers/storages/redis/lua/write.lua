-- Change the state columns of one row if one of the guards matches whole.
--
-- KEYS[1]  the session's hash
-- KEYS[2]  the due dates
-- ARGV[1]  JSON: {instance, incarnation, [guards], changes, due date or '', <uid length>:<uid>};
--          guards and changes are [[column, value], ...]; a value '+<ms>' is the storage's
--          time plus that, which in a guard the column must not be beyond

local write = cjson.decode(ARGV[1])
local field = 'i:' .. write[1]
local row = redis.call('HGET', KEYS[1], field)
local incarnation = string.match(redis.call('HGET', KEYS[1], 'v') or '', '^(.-) ')
if not row and write[5] ~= '' then set_due(KEYS[2], write[6], write[1], 0) end
if not row or incarnation ~= write[2] then return {0, false} end

local now = now_ms()

local function moment(value)
  if string.sub(value, 1, 1) ~= '+' then return nil end
  return now + tonumber(string.sub(value, 2))
end

local newline = string.find(row, '\n', 1, true)
local columns = {}
for column in string.gmatch(string.sub(row, 1, newline - 1) .. '|', '([^|]*)|') do
  columns[#columns + 1] = column
end

local function matches(guard)
  for _, pair in ipairs(guard) do
    local latest = moment(pair[2])
    if latest then
      if tonumber(columns[pair[1]]) > latest then return false end
    elseif columns[pair[1]] ~= pair[2] then
      return false
    end
  end
  return true
end

local matched = false
for _, guard in ipairs(write[3]) do matched = matched or matches(guard) end
if not matched then return {0, row} end

for _, pair in ipairs(write[4]) do
  local at = moment(pair[2])
  columns[pair[1]] = at and string.format('%d', at) or pair[2]
end
columns[1] = string.format('%d', tonumber(columns[1]) + 1)
row = table.concat(columns, '|') .. string.sub(row, newline)
redis.call('HSET', KEYS[1], field, row)
if write[5] ~= '' then
  set_due(KEYS[2], write[6], write[1], moment(write[5]) or tonumber(write[5]))
end
return {1, row}
